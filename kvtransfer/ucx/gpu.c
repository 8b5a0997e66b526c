/* A pool in GPU memory: UCX reads a page only once the stream that computes it has come so far, and what a NIC has written counts only once
   the GPU's kernels see it. CUDA's driver is found when such a pool is registered. */

#include <dlfcn.h>
#include <stdio.h>

#include "shim.h"

enum { CUDA_SUCCESS = 0, CUDA_ERROR_NOT_READY = 600 };
enum { CU_EVENT_DISABLE_TIMING = 2 };
enum { CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS = 117, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING = 118 };
enum { CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST = 1, CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER = 100 };
enum { CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX = 0, CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER = 100 };

#define CUDA_FUNCTIONS(X)                                             \
    X(cuCtxGetCurrent, (void **context))                              \
    X(cuCtxSetCurrent, (void *context))                               \
    X(cuCtxSynchronize, (void))                                       \
    X(cuCtxGetDevice, (int *device))                                  \
    X(cuDeviceGetAttribute, (int *value, int attribute, int device))  \
    X(cuEventCreate, (void **event, unsigned flags))                  \
    X(cuEventRecord, (void *event, void *stream))                     \
    X(cuEventQuery, (void *event))                                    \
    X(cuEventDestroy_v2, (void *event))                               \
    X(cuFlushGPUDirectRDMAWrites, (int target, int scope))

#define X(name, arguments) int(*name) arguments;
static struct {
    CUDA_FUNCTIONS(X)
} cuda;
#undef X

static int failed(char *text, const char *call, int error)
{
    char why[32];
    snprintf(why, sizeof why, "CUDA error %d", error);
    return say(text, DX_FAILED, call, why);
}

/* Of the context that is current where it is called, as it will be where pages are written from. */
int gpu_open(gpu_t *gpu, const char *driver, char *text)
{
    int device = 0, ordering = 0, options = 0, error;
    void *handle = dlopen(driver, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL)
        return say(text, DX_FAILED, driver, dlerror());
#define X(name, arguments)                                    \
    if ((*(void **)&cuda.name = dlsym(handle, #name)) == NULL) \
        return say(text, DX_FAILED, driver, "has no " #name);
    CUDA_FUNCTIONS(X)
#undef X
    if ((error = cuda.cuCtxGetCurrent(&gpu->context)) != CUDA_SUCCESS)
        return failed(text, "cuCtxGetCurrent", error);
    if (gpu->context == NULL)
        return say(text, DX_FAILED, "CUDA", "no context is current");
    if ((error = cuda.cuCtxGetDevice(&device)) != CUDA_SUCCESS)
        return failed(text, "cuCtxGetDevice", error);
    cuda.cuDeviceGetAttribute(&ordering, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING, device);
    cuda.cuDeviceGetAttribute(&options, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS, device);
    gpu->flushes = ordering < CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER;
    if (gpu->flushes && !(options & CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST))
        return say(text, DX_FAILED, "this GPU", "neither orders a NIC's writes before its kernels nor flushes them");
    return DX_OK;
}

/* For the shim's thread: UCX's own CUDA parts take whatever context is current. */
void gpu_enter(const gpu_t *gpu)
{
    if (gpu->context != NULL)
        cuda.cuCtxSetCurrent(gpu->context);
}

/* What the stream has been given so far; to be forgotten. */
int gpu_mark(void *stream, void **mark, char *text)
{
    int error = cuda.cuEventCreate(mark, CU_EVENT_DISABLE_TIMING);
    if (error != CUDA_SUCCESS) {
        *mark = NULL;
        return failed(text, "cuEventCreate", error);
    }
    return (error = cuda.cuEventRecord(*mark, stream)) == CUDA_SUCCESS ? DX_OK : failed(text, "cuEventRecord", error);
}

/* Copies that UCX has begun over CUDA IPC outlive its worker, and nothing that their target tears down stops them. */
void gpu_settle(const gpu_t *gpu)
{
    if (gpu->context != NULL)
        cuda.cuCtxSynchronize();
}

mark_state_t gpu_look(void *mark)
{
    int error = cuda.cuEventQuery(mark);
    return error == CUDA_SUCCESS ? MARK_PASSED : error == CUDA_ERROR_NOT_READY ? MARK_AHEAD : MARK_LOST;
}

void gpu_forget(void *mark)
{
    if (mark != NULL)
        cuda.cuEventDestroy_v2(mark);
}

bool gpu_shows_writes(const gpu_t *gpu)
{
    enum { TARGET = CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX, SCOPE = CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER };
    return !gpu->flushes || cuda.cuFlushGPUDirectRDMAWrites(TARGET, SCOPE) == CUDA_SUCCESS;
}
