// Stands in for libcuda where there is no GPU: a launch writes down what it was given, and returns.

#include <string.h>

#include "cuda.h"

#define MOST 256  // arguments of a kernel

static struct {
  unsigned long long function, grid[3], threads, shared, values[MOST];
} launched;

static int count;        // of the next launch's arguments, as its signature says
static int sizes[MOST];  // in bytes
static long launches;

void stand_in_expect(int n, const int *bytes) {
  count = n;
  memcpy(sizes, bytes, n * sizeof(int));
}

const void *stand_in_launched(void) { return &launched; }

long stand_in_launches(void) { return launches; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  memset(&launched, 0, sizeof launched);
  launched.function = (unsigned long long)function;
  launched.grid[0] = config->gridDimX;
  launched.grid[1] = config->gridDimY;
  launched.grid[2] = config->gridDimZ;
  launched.threads = config->blockDimX;
  launched.shared = config->sharedMemBytes;
  for (int i = 0; i < count; i++) memcpy(&launched.values[i], arguments[i], sizes[i]);
  launches++;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;  // memory of the CPU passes for a device's
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "the stand-in has no errors";
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
