/* NVRTC for a card that computes nothing: it compiles nothing. See runtime.c. */

#include <stddef.h>
#include <string.h>

enum { SIZE = 16 };

int nvrtcVersion(int *major, int *minor) {
    *major = 13;
    return *minor = 0;
}

int nvrtcCreateProgram(void **out) { return *out = (void *)1, 0; }
int nvrtcDestroyProgram(void **program) { return 0; }
int nvrtcAddNameExpression(void) { return 0; }
int nvrtcCompileProgram(void) { return 0; }
int nvrtcGetLoweredName(void *program, const char *name, const char **out) { return *out = name, 0; }
int nvrtcGetCUBINSize(void *program, size_t *out) { return *out = SIZE, 0; }
int nvrtcGetPTXSize(void *program, size_t *out) { return *out = SIZE, 0; }
int nvrtcGetProgramLogSize(void *program, size_t *out) { return *out = 1, 0; }
int nvrtcGetCUBIN(void *program, char *out) { return memset(out, 0, SIZE), 0; }
int nvrtcGetPTX(void *program, char *out) { return memset(out, 0, SIZE), 0; }
int nvrtcGetProgramLog(void *program, char *out) { return *out = 0; }
const char *nvrtcGetErrorString(int error) { return "nullcard"; }
