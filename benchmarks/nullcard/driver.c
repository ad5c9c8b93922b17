/* The driver of a card that computes nothing: what torch's allocator and Triton ask it for. See runtime.c. */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { OUT_OF_MEMORY = 2, GRANULARITY = 2 << 20, NOT_SUPPORTED = 801, ON_DEVICE = 3, POINTER = 4, REGISTERS = 4 };

extern int nullcard_take(size_t size);
extern void nullcard_give(size_t size);
extern int nullcard_attribute(int *out, int attribute, int device);

static int some(void **out) { return *out = (void *)1, 0; }

static int number(int *out, int value) { return *out = value, 0; }

int cuDriverGetVersion(int *out) { return number(out, 13000); }
int cuDeviceGet(int *out, int device) { return number(out, device); }
int cuDeviceGetCount(int *out) { return number(out, 1); }
int cuDeviceGetAttribute(int *out, int attribute, int device) { return nullcard_attribute(out, attribute, device); }
int cuCtxGetCurrent(void **out) { return some(out); }
int cuCtxGetDevice(int *out) { return number(out, 0); }
int cuDevicePrimaryCtxRetain(void **out, int device) { return some(out); }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    return number(active, 1);
}

int cuGetErrorString(int error, const char **out) { return *out = "an error of a card that computes nothing", 0; }
int cuGetErrorName(int error, const char **out) { return *out = "nullcard", 0; }

/* Virtual memory, as expandable segments use it: the room is reserved, the bytes are accounted for as they are made. */

int cuMemGetAllocationGranularity(size_t *out, const void *properties, int option) { return *out = GRANULARITY, 0; }

int cuMemAddressReserve(uintptr_t *out, size_t size, size_t alignment, uintptr_t wanted, uint64_t flags) {
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *out = (uintptr_t)start;
    return start == MAP_FAILED ? OUT_OF_MEMORY : 0;
}

int cuMemAddressFree(uintptr_t start, size_t size) { return munmap((void *)start, size); }

int cuMemCreate(uint64_t *out, size_t size, const void *properties, uint64_t flags) {
    if (nullcard_take(size)) return OUT_OF_MEMORY;
    size_t *handle = malloc(sizeof *handle);
    *handle = size;
    *out = (uintptr_t)handle;
    return 0;
}

int cuMemRelease(uint64_t handle) {
    nullcard_give(*(size_t *)(uintptr_t)handle);
    return free((void *)(uintptr_t)handle), 0;
}

int cuMemExportToShareableHandle(void) { return NOT_SUPPORTED; }

/* Compiled kernels are loaded and launched by name, and are not there. */

int cuModuleLoad(void **out, const char *path) { return some(out); }
int cuModuleLoadData(void **out, const void *image) { return some(out); }
int cuModuleLoadDataEx(void **out, const void *image, unsigned count, void *options, void *values) { return some(out); }
int cuModuleGetFunction(void **out, void *module, const char *name) { return some(out); }
int cuLinkCreate_v2(unsigned count, void *options, void *values, void **out) { return some(out); }

int cuLinkComplete(void *state, void **out, size_t *size) {
    static char image[16];
    *out = image;
    *size = sizeof image;
    return 0;
}

int cuFuncGetAttribute(int *out, int attribute, void *kernel) { return number(out, attribute == REGISTERS ? 32 : 0); }
int cuOccupancyMaxActiveClusters(int *out, void *kernel, void *config) { return number(out, 8); }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *out) { return number(out, 2); }

int cuPointerGetAttribute(void *out, int attribute, uintptr_t address) {
    if (attribute == ON_DEVICE || attribute == POINTER) *(uintptr_t *)out = address;
    else *(int *)out = 0;
    return 0;
}
