/* A card that computes nothing: the parts of CUDA's runtime, cuBLAS, cuDNN and NVRTC that say something to torch.

   Memory is accounted for as a card of NULLCARD_BYTES would. NULLCARD_HIDDEN of it are never given out, and said to be
   free until cuBLAS is first used, as libraries take memory.
   Copies to the host are made; others only if small, or with NULLCARD_COPIES. Kernels, streams and events do nothing,
   so results are whatever the memory held, mostly zeros. What nullcard.py generates beside this returns success. */

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <driver_types.h>

enum { OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713 };
enum { HOST = 1, DEVICE = 2 };
enum { TO_HOST = 2, SMALL = 65536, VERSION = 13000, CUDNN = 91900, ALLOCATIONS = 1 << 18 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { char *start; size_t size; int kind; } known[ALLOCATIONS];
static int count;
static size_t used;
static int libraries;

static size_t setting(const char *name, size_t otherwise) {
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 10) : otherwise;
}

static size_t total(void) { return setting("NULLCARD_BYTES", 139ull << 30); }

/* Bytes of the card, for both interfaces. */
int nullcard_take(size_t size) {
    pthread_mutex_lock(&lock);
    int fits = used + size <= total() - setting("NULLCARD_HIDDEN", 0);
    if (fits) used += size;
    pthread_mutex_unlock(&lock);
    return fits ? 0 : OUT_OF_MEMORY;
}

void nullcard_give(size_t size) {
    pthread_mutex_lock(&lock);
    used -= size;
    pthread_mutex_unlock(&lock);
}

static void remember(void *start, size_t size, int kind) {
    pthread_mutex_lock(&lock);
    int place = 0;
    while (place < count && known[place].start) place++;
    if (place == ALLOCATIONS) abort();
    if (place == count) count++;
    known[place].start = start;
    known[place].size = size;
    known[place].kind = kind;
    pthread_mutex_unlock(&lock);
}

static size_t forget(void *start) {
    size_t size = 0;
    pthread_mutex_lock(&lock);
    for (int place = 0; place < count; place++)
        if (known[place].start == start) {
            size = known[place].size;
            known[place].start = NULL;
            break;
        }
    pthread_mutex_unlock(&lock);
    return size;
}

static int kind_of(const char *address) {
    int kind = 0;
    pthread_mutex_lock(&lock);
    for (int place = 0; place < count && !kind; place++)
        if (known[place].start && known[place].start <= address && address < known[place].start + known[place].size)
            kind = known[place].kind;
    pthread_mutex_unlock(&lock);
    return kind;
}

static int some(void **out) { return *out = calloc(1, 4096), 0; }

static int number(int *out, int value) { return *out = value, 0; }

/* Memory */

int cudaMalloc(void **out, size_t size) {
    if (nullcard_take(size)) return OUT_OF_MEMORY;
    *out = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*out == MAP_FAILED) abort();
    remember(*out, size, DEVICE);
    return 0;
}

int cudaFree(void *start) {
    size_t size = start ? forget(start) : 0;
    if (!size) return 0;
    nullcard_give(size);
    return munmap(start, size);
}

int cudaHostAlloc(void **out, size_t size, unsigned flags) {
    *out = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*out == MAP_FAILED) return OUT_OF_MEMORY;
    remember(*out, size, HOST);
    return 0;
}

int cudaFreeHost(void *start) {
    size_t size = forget(start);
    return size ? munmap(start, size) : 0;
}

int cudaHostRegister(void *start, size_t size, unsigned flags) {
    if (kind_of(start)) return ALREADY_REGISTERED;
    remember(start, size, HOST);
    return 0;
}

int cudaHostUnregister(void *start) { return forget(start) ? 0 : NOT_REGISTERED; }

int cudaMemGetInfo(size_t *left, size_t *all) {
    *all = total();
    *left = *all - used - (libraries ? setting("NULLCARD_HIDDEN", 0) : 0);
    return 0;
}

int cudaMemcpyAsync(void *to, const void *from, size_t size, int direction, void *stream) {
    if (direction == TO_HOST || size <= SMALL || getenv("NULLCARD_COPIES")) memmove(to, from, size);
    return 0;
}

int cudaMemcpy(void *to, const void *from, size_t size, int direction) {
    return cudaMemcpyAsync(to, from, size, direction, NULL);
}

int cudaMemcpy2DAsync(
    char *to, size_t step, const char *from, size_t stride, size_t width, size_t height, int direction, void *stream
) {
    for (size_t row = 0; row < height; row++)
        cudaMemcpyAsync(to + row * step, from + row * stride, width, direction, stream);
    return 0;
}

int cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *address) {
    memset(out, 0, sizeof *out);
    out->type = kind_of(address);
    out->devicePointer = (void *)address;
    out->hostPointer = out->type == DEVICE ? NULL : (void *)address;
    return 0;
}

/* The card */

int cudaGetDevice(int *out) { return number(out, 0); }
int cudaGetDeviceCount(int *out) { return number(out, 1); }
int cudaSetDevice(int device) { return device ? INVALID_DEVICE : 0; }
int cudaDriverGetVersion(int *out) { return number(out, VERSION); }
int cudaRuntimeGetVersion(int *out) { return number(out, VERSION); }

int cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
    memset(out, 0, sizeof *out);
    strcpy(out->name, "a card that computes nothing");
    out->major = 9;
    out->multiProcessorCount = 132;
    out->totalGlobalMem = total();
    out->warpSize = 32;
    out->maxThreadsPerBlock = 1024;
    out->maxThreadsPerMultiProcessor = 2048;
    out->regsPerBlock = out->regsPerMultiprocessor = 65536;
    out->sharedMemPerBlock = 49152;
    out->sharedMemPerBlockOptin = 232448;
    out->sharedMemPerMultiprocessor = 233472;
    out->l2CacheSize = 60 << 20;
    out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
    out->maxThreadsDim[2] = 64;
    out->maxGridSize[0] = out->memPitch = 2147483647;
    out->maxGridSize[1] = out->maxGridSize[2] = 65535;
    out->textureAlignment = 512;
    out->canMapHostMemory = out->concurrentKernels = out->unifiedAddressing = 1;
    return 0;
}

int nullcard_attribute(int *out, int attribute, int device) {
    switch (attribute) {
        case 1: return number(out, 1024);
        case 8: return number(out, 49152);
        case 10: return number(out, 32);
        case 12: case 82: return number(out, 65536);
        case 16: return number(out, 132);
        case 39: return number(out, 2048);
        case 75: return number(out, 9);
        case 76: case 99: return number(out, 0);
        case 81: return number(out, 233472);
        case 97: return number(out, 232448);
        default: return number(out, 1);
    }
}

int cudaDeviceGetAttribute(int *out, int attribute, int device) { return nullcard_attribute(out, attribute, device); }

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}

int cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *kernel) {
    memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = 1024;
    out->numRegs = 32;
    out->binaryVersion = out->ptxVersion = 90;
    return 0;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *out, const void *kernel, int threads, size_t shared) {
    return number(out, 2);
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *out, const void *kernel, int threads, size_t shared, unsigned flags
) {
    return number(out, 2);
}

int cudaGetSymbolAddress(void **out, const void *symbol) {
    static char place[1 << 20];
    return *out = place, 0;
}

int cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version, uint64_t flags, int *status) {
    *out = dlsym(dlopen("libcuda.so.1", RTLD_NOW), name);
    return status ? number(status, !*out) : 0;
}

const char *cudaGetErrorString(int error) { return "an error of a card that computes nothing"; }
const char *cudaGetErrorName(int error) { return "nullcard"; }
int __cudaGetKernel(void **out, const void *function) { return *out = (void *)function, 0; }

/* Streams and events */

int cudaStreamCreate(void **out) { return some(out); }
int cudaStreamCreateWithPriority(void **out, unsigned flags, int priority) { return some(out); }
int cudaStreamGetPriority(void *stream, int *out) { return number(out, 0); }
int cudaStreamIsCapturing(void *stream, int *out) { return number(out, 0); }
int cudaStreamGetCaptureInfo(void *stream, int *out) { return number(out, 0); }
int cudaEventCreate(void **out) { return some(out); }
int cudaEventCreateWithFlags(void **out, unsigned flags) { return some(out); }
int cudaEventDestroy(void *event) { return free(event), 0; }
int cudaEventElapsedTime(float *out, void *start, void *end) { return *out = 1.0f, 0; }
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) { return function(data), 0; }

/* Libraries */

int cublasCreate_v2(void **out) { return libraries = 1, some(out); }
int cublasLtCreate(void **out) { return some(out); }
int cublasGetMathMode(void *handle, int *out) { return number(out, 0); }
int cublasGetPointerMode_v2(void *handle, int *out) { return number(out, 0); }
int cublasGetVersion_v2(void *handle, int *out) { return number(out, 130100); }
size_t cublasLtGetVersion(void) { return 130100; }
const char *cublasGetStatusString(int status) { return "nullcard"; }
int cublasLtMatmulDescCreate(void **out) { return some(out); }
int cublasLtMatrixLayoutCreate(void **out) { return some(out); }
int cublasLtMatmulPreferenceCreate(void **out) { return some(out); }

int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *product, void *a, void *b, void *c, void *d, void *preference, int wanted, void *out, int *found
) {
    memset(out, 0, 96);
    return number(found, 1);
}

size_t cudnnGetVersion(void) { return CUDNN; }
size_t cudnnGetCudartVersion(void) { return VERSION; }
int cudnnCreate(void **out) { return some(out); }
const char *cudnnGetErrorString(int error) { return "nullcard"; }
void cudnnGetLastErrorString(char *out, size_t size) { strncpy(out, "nullcard", size); }
int cudnnGetProperty(int which, int *out) { return number(out, which == 0 ? 9 : which == 1 ? 19 : 0); }
int cudnnBackendCreateDescriptor(int kind, void **out) { return some(out); }
int cudnnBackendDestroyDescriptor(void *descriptor) { return free(descriptor), 0; }

/* One engine for everything, without notes against it, workspace or shared memory. */
int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t wanted, int64_t *found, void *out) {
    enum { INT64 = 3, NUMERICAL_NOTE = 11, BEHAVIOR_NOTE = 19, INT32 = 23 };
    int note = type == NUMERICAL_NOTE || type == BEHAVIOR_NOTE;
    if (found) *found = note ? 0 : 1;
    if (out && wanted > 0 && type == INT64) memset(out, 0, 8);
    if (out && wanted > 0 && type == INT32) memset(out, 0, 4);
    return 0;
}
