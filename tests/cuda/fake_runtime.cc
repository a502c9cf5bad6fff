/* SPDX-License-Identifier: Apache-2.0 */
/** @file fake_runtime.cc A CUDA runtime without a GPU: its memory and its errors. */
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include <cuda_runtime.h>

#include "fake_cuda.h"
#include "fake_inside.h"

namespace {

/* ---- errors ---- */

int64_t calls, failing_call, breaking_call;
cudaError_t failure, breakage, last_error;
int gpus = 1, current_gpu;
bool is_recorded;
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
int capability[2] = {8, 0};

bool is_broken()
{
    return breaking_call > 0 && calls >= breaking_call;
}

/* Whether what might wait for the GPU is refused, as a graph is being recorded. */
bool is_refused()
{
    return is_recorded && capture_mode != cudaStreamCaptureModeRelaxed;
}

/* ---- memory ---- */

struct piece {
    char *pages; /* the last one is never touched */
    size_t page_bytes;
    char *data;
    size_t bytes;
    bool is_host;
    int gpu;
};

std::vector<piece> pieces;
int64_t pools, memory_limit = -1, memory_in_use;

const size_t PAGE = (size_t)sysconf(_SC_PAGESIZE);
constexpr size_t ALIGNMENT = 16; /* a GPU's is larger, but then the end would not be at the page */

cudaError_t allocate(void **memory, size_t bytes, bool is_host)
{
    MAY_FAIL();
    if (!is_host && memory_limit >= 0 && memory_in_use + (int64_t)bytes > memory_limit)
        return fake_finish(cudaErrorMemoryAllocation);
    size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    size_t page_bytes = (rounded + PAGE - 1) / PAGE * PAGE + PAGE;
    void *pages =
        mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        return fake_finish(cudaErrorMemoryAllocation);
    /* The last page is of another kind, which the kernel does not join with the others each time that they
     * are closed. */
    char *end = (char *)pages + page_bytes - PAGE;
    if (mmap(end, PAGE, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) {
        munmap(pages, page_bytes);
        return fake_finish(cudaErrorMemoryAllocation);
    }
    std::memset(pages, 0xFF, page_bytes - PAGE);
    if (!is_host)
        mprotect(pages, page_bytes - PAGE, PROT_NONE);
    pieces.push_back({(char *)pages, page_bytes, end - rounded, bytes, is_host, current_gpu});
    memory_in_use += is_host ? 0 : (int64_t)bytes;
    *memory = end - rounded;
    return cudaSuccess;
}

cudaError_t release(void *memory, bool is_host)
{
    if (memory == nullptr)
        return cudaSuccess;
    for (size_t i = 0; i < pieces.size(); i++) {
        if (pieces[i].data == memory && pieces[i].is_host == is_host) {
            memory_in_use -= is_host ? 0 : (int64_t)pieces[i].bytes;
            munmap(pieces[i].pages, pieces[i].page_bytes);
            pieces.erase(pieces.begin() + (ptrdiff_t)i);
            return is_broken() ? fake_finish(breakage) : cudaSuccess;
        }
    }
    return fake_finish(cudaErrorInvalidValue);
}

const piece *find_piece(const void *pointer)
{
    for (const piece &at : pieces) {
        if ((const char *)pointer >= at.data && (const char *)pointer < at.data + at.bytes)
            return &at;
    }
    return nullptr;
}

/* Whether bytes from `pointer` on are in one piece of the GPU's memory. */
bool is_on_gpu(const void *pointer, size_t bytes)
{
    const piece *found = find_piece(pointer);
    return found != nullptr && !found->is_host &&
           (const char *)pointer + bytes <= found->data + found->bytes;
}

} // namespace

/* ---- what the threads share with it ---- */

cudaError_t fake_finish(cudaError_t error)
{
    if (error != cudaSuccess)
        last_error = error;
    return error;
}

cudaError_t fake_next_error()
{
    calls++;
    return is_broken() ? breakage : calls == failing_call ? failure : cudaSuccess;
}

static void protect(const piece *at, int how)
{
    if (at != nullptr && !at->is_host)
        mprotect(at->pages, at->page_bytes - PAGE, how);
}

fake_opened::fake_opened()
{
    for (const piece &at : pieces)
        protect(&at, PROT_READ | PROT_WRITE);
}

fake_opened::~fake_opened()
{
    for (const piece &at : pieces)
        protect(&at, PROT_NONE);
}

/* ---- the runtime's interface ---- */

cudaError_t cudaGetLastError(void)
{
    cudaError_t error = last_error;
    last_error = is_broken() ? breakage : cudaSuccess;
    return error;
}

static const struct {
    cudaError_t error;
    const char *name, *text;
} texts[] = {
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
};

const char *cudaGetErrorString(cudaError_t error)
{
    for (const auto &at : texts) {
        if (at.error == error)
            return at.text;
    }
    return "unknown error";
}

const char *cudaGetErrorName(cudaError_t error)
{
    for (const auto &at : texts) {
        if (at.error == error)
            return at.name;
    }
    return "cudaErrorUnknown";
}

cudaError_t cudaGetDeviceCount(int *count)
{
    MAY_FAIL();
    if (gpus == 0)
        return fake_finish(cudaErrorNoDevice);
    *count = gpus;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
    MAY_FAIL();
    *device = current_gpu;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    MAY_FAIL();
    if (device < 0 || device >= gpus)
        return fake_finish(cudaErrorInvalidDevice);
    current_gpu = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int)
{
    MAY_FAIL();
    switch (which) {
    case cudaDevAttrMultiProcessorCount:
        *value = 3;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = capability[0];
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = capability[1];
        break;
    case cudaDevAttrPageableMemoryAccess:
        *value = 0;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = 163 << 10;
        break;
    }
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int)
{
    std::snprintf(properties->name, sizeof properties->name, "emulated GPU");
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *)
{
    MAY_FAIL();
    *pool = (cudaMemPool_t)pool;
    pools++;
    return cudaSuccess;
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t)
{
    pools--;
    return is_broken() ? fake_finish(breakage) : cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, enum cudaMemPoolAttr, void *)
{
    MAY_FAIL();
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **memory, size_t bytes)
{
    return is_refused() ? fake_finish(cudaErrorStreamCaptureUnsupported)
                        : allocate(memory, bytes, false);
}

cudaError_t cudaFree(void *memory)
{
    return is_refused() ? fake_finish(cudaErrorStreamCaptureUnsupported) : release(memory, false);
}

cudaError_t cudaMallocHost(void **memory, size_t bytes)
{
    return is_refused() ? fake_finish(cudaErrorStreamCaptureUnsupported)
                        : allocate(memory, bytes, true);
}

cudaError_t cudaFreeHost(void *memory)
{
    return is_refused() ? fake_finish(cudaErrorStreamCaptureUnsupported) : release(memory, true);
}

cudaError_t cudaMallocFromPoolAsync(void **memory, size_t bytes, cudaMemPool_t, cudaStream_t)
{
    return allocate(memory, bytes, false);
}

/* A graph frees its own memory alone. On the default stream of another GPU it would be freed while its own
 * GPU may be at work there. */
cudaError_t cudaFreeAsync(void *memory, cudaStream_t)
{
    const piece *found = find_piece(memory);
    if (is_recorded || (found != nullptr && found->gpu != current_gpu))
        return fake_finish(cudaErrorInvalidValue);
    return release(memory, false);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t)
{
    MAY_FAIL();
    bool to_gpu = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_gpu = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (to_gpu != is_on_gpu(to, bytes) || from_gpu != is_on_gpu(from, bytes))
        return fake_finish(cudaErrorInvalidValue);
    const piece *ends[2] = {find_piece(to), find_piece(from)};
    for (const piece *at : ends)
        protect(at, PROT_READ | PROT_WRITE);
    std::memmove(to, from, bytes);
    for (const piece *at : ends)
        protect(at, PROT_NONE);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t)
{
    MAY_FAIL();
    if (!is_on_gpu(memory, bytes))
        return fake_finish(cudaErrorInvalidValue);
    const piece *at = find_piece(memory);
    protect(at, PROT_READ | PROT_WRITE);
    std::memset(memory, value, bytes);
    protect(at, PROT_NONE);
    return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(void *memory, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t)
{
    MAY_FAIL();
    if (width == 0 || height == 0)
        return cudaSuccess;
    if (!is_on_gpu(memory, pitch * (height - 1) + width))
        return fake_finish(cudaErrorInvalidValue);
    const piece *at = find_piece(memory);
    protect(at, PROT_READ | PROT_WRITE);
    for (size_t i = 0; i < height; i++)
        std::memset((char *)memory + i * pitch, value, width);
    protect(at, PROT_NONE);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer)
{
    MAY_FAIL();
    const piece *found = find_piece(pointer);
    *attributes = cudaPointerAttributes{};
    attributes->device = found != nullptr ? found->gpu : 0;
    attributes->type = found == nullptr ? cudaMemoryTypeUnregistered
                       : found->is_host ? cudaMemoryTypeHost
                                        : cudaMemoryTypeDevice;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, enum cudaStreamCaptureStatus *status)
{
    MAY_FAIL();
    *status = is_recorded ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode)
{
    std::swap(*mode, capture_mode);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    MAY_FAIL();
    return is_recorded ? fake_finish(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *, enum cudaFuncAttribute, int)
{
    MAY_FAIL();
    return cudaSuccess;
}

/* ---- what tests ask ---- */

void fake_cuda_fail_at(int64_t n, cudaError_t error)
{
    failing_call = n == 0 ? 0 : calls + n;
    failure = error;
    last_error = cudaSuccess;
}

void fake_cuda_break_at(int64_t n, cudaError_t error)
{
    breaking_call = n == 0 ? 0 : calls + n;
    breakage = error;
    last_error = cudaSuccess;
}

int64_t fake_cuda_calls(void)
{
    return calls;
}

int64_t fake_cuda_live(void)
{
    return (int64_t)pieces.size() + pools;
}

void fake_cuda_record(bool recorded)
{
    is_recorded = recorded;
}

void fake_cuda_have(int count)
{
    gpus = count;
}

void fake_cuda_capability(int major, int minor)
{
    capability[0] = major;
    capability[1] = minor;
}

void fake_cuda_room(int64_t bytes)
{
    memory_limit = bytes < 0 ? -1 : memory_in_use + bytes;
}
