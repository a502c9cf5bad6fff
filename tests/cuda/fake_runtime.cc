/* SPDX-License-Identifier: Apache-2.0 */
/** @file fake_runtime.cc A CUDA runtime without a GPU: its memory, its errors, and its threads. */
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cuda_runtime.h>

#include "fake_cuda.h"

namespace {

/* ---- errors ---- */

int64_t calls, failing_call;
cudaError_t failure, last_error;
int gpus = 1, current_gpu;

cudaError_t finish(cudaError_t error)
{
    if (error != cudaSuccess)
        last_error = error;
    return error;
}

/* Whether this call is the one that is to fail. */
bool fails()
{
    return ++calls == failing_call;
}

/* ---- memory ---- */

struct piece {
    char *pages; /* the last one is never touched */
    size_t page_bytes;
    char *data;
    size_t bytes;
    bool is_host;
};

std::vector<piece> pieces;

const size_t PAGE = (size_t)sysconf(_SC_PAGESIZE);
constexpr size_t ALIGNMENT = 16; /* a GPU's is larger, but then the end would not be at the page */

cudaError_t allocate(void **memory, size_t bytes, bool is_host)
{
    if (fails())
        return finish(failure);
    size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    size_t page_bytes = (rounded + PAGE - 1) / PAGE * PAGE + PAGE;
    void *pages =
        mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        return finish(cudaErrorMemoryAllocation);
    char *end = (char *)pages + page_bytes - PAGE;
    std::memset(pages, 0xFF, page_bytes - PAGE);
    mprotect(end, PAGE, PROT_NONE);
    if (!is_host)
        mprotect(pages, page_bytes, PROT_NONE);
    pieces.push_back({(char *)pages, page_bytes, end - rounded, bytes, is_host});
    *memory = end - rounded;
    return cudaSuccess;
}

cudaError_t release(void *memory, bool is_host)
{
    if (memory == nullptr)
        return cudaSuccess;
    for (size_t i = 0; i < pieces.size(); i++) {
        if (pieces[i].data == memory && pieces[i].is_host == is_host) {
            munmap(pieces[i].pages, pieces[i].page_bytes);
            pieces.erase(pieces.begin() + (ptrdiff_t)i);
            return cudaSuccess;
        }
    }
    return finish(cudaErrorInvalidValue);
}

const piece *find_piece(const void *pointer)
{
    for (const piece &at : pieces) {
        if ((const char *)pointer >= at.data && (const char *)pointer < at.data + at.bytes)
            return &at;
    }
    return nullptr;
}

/* Opens the GPU's memory as long as it lives. */
struct opened {
    opened()
    {
        protect(PROT_READ | PROT_WRITE);
    }
    ~opened()
    {
        protect(PROT_NONE);
    }
    static void protect(int how)
    {
        for (const piece &at : pieces) {
            if (!at.is_host)
                mprotect(at.pages, at.page_bytes - PAGE, how);
        }
    }
};

/* Whether bytes from `pointer` on are in one piece of the GPU's memory. */
bool is_on_gpu(const void *pointer, size_t bytes)
{
    const piece *found = find_piece(pointer);
    return found != nullptr && !found->is_host &&
           (const char *)pointer + bytes <= found->data + found->bytes;
}

/* ---- threads ---- */

constexpr size_t STACK_BYTES = 256 << 10;

struct fiber {
    ucontext_t context;
    jmp_buf at;
    dim3 thread;
    bool has_started, is_done;
    std::unique_ptr<char[]> stack;
};

/* Threads that wait for each other. Two rooms in turn, so that one wait does for an exchange: nobody is
 * two waits ahead. */
struct meeting {
    int members, arrived, sum, result[2];
    int64_t round;
    std::vector<char> room[2];
    unsigned there[2];
};

struct block_run {
    std::vector<fiber> fibers;
    meeting block;
    std::vector<meeting> warps;
    const std::function<void()> *body;
    size_t running;
    jmp_buf scheduler;
    int64_t progress; /* waits that are over, and threads that have returned */
};

block_run *run;
std::vector<char> shared;

void close_round(meeting *at)
{
    if (at->arrived > 0 && at->arrived == at->members) {
        at->result[at->round % 2] = at->sum;
        at->arrived = at->sum = 0;
        at->round++;
        run->progress++;
    }
}

void yield()
{
    if (_setjmp(run->fibers[run->running].at) == 0)
        _longjmp(run->scheduler, 1);
    threadIdx = run->fibers[run->running].thread;
}

/* Waits for the others; which of the two rooms it was. */
int meet(meeting *at, int value)
{
    int64_t round = at->round;
    at->sum += value;
    at->arrived++;
    close_round(at);
    while (at->round == round)
        yield();
    return (int)(round % 2);
}

void run_thread()
{
    (*run->body)();
    run->fibers[run->running].is_done = true;
    run->progress++;
    meeting *warp = &run->warps[run->running / 32];
    run->block.members--;
    warp->members--;
    close_round(&run->block);
    close_round(warp);
    _longjmp(run->scheduler, 1);
}

void resume(size_t which)
{
    run->running = which;
    fiber &next = run->fibers[which];
    threadIdx = next.thread;
    if (_setjmp(run->scheduler) != 0)
        return;
    if (next.has_started)
        _longjmp(next.at, 1);
    next.has_started = true;
    setcontext(&next.context);
}

void run_block(block_run *made)
{
    run = made;
    size_t count = made->fibers.size();
    made->block = meeting{(int)count, 0, 0, {0, 0}, 0, {}, {0, 0}};
    made->warps.assign((count + 31) / 32, meeting{});
    for (size_t i = 0; i < count; i++) {
        fiber &at = made->fibers[i];
        made->warps[i / 32].members++;
        at.has_started = at.is_done = false;
        at.thread = dim3((unsigned)(i % blockDim.x), (unsigned)(i / blockDim.x % blockDim.y),
                         (unsigned)(i / blockDim.x / blockDim.y));
        getcontext(&at.context);
        if (at.stack == nullptr)
            at.stack = std::unique_ptr<char[]>(new char[STACK_BYTES]);
        at.context.uc_stack.ss_sp = at.stack.get();
        at.context.uc_stack.ss_size = STACK_BYTES;
        at.context.uc_link = nullptr;
        makecontext(&at.context, run_thread, 0);
    }
    bool goes_on = true;
    while (goes_on) {
        int64_t before = made->progress;
        goes_on = false;
        for (size_t i = 0; i < count; i++) {
            if (!made->fibers[i].is_done) {
                goes_on = true;
                resume(i);
            }
        }
        if (goes_on && made->progress == before) {
            std::fprintf(stderr, "emulated GPU: threads of a block wait for each other for ever\n");
            std::abort();
        }
    }
}

} // namespace

dim3 threadIdx, blockIdx, blockDim, gridDim;

void sebp_emulate_grid(dim3 grid, dim3 block, size_t shared_bytes,
                       const std::function<void()> &body)
{
    if (fails()) {
        finish(failure);
        return;
    }
    opened memory;
    block_run made{};
    made.fibers = std::vector<fiber>((size_t)block.x * block.y * block.z);
    made.body = &body;
    gridDim = grid;
    blockDim = block;
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = dim3(x, y, z);
                shared.assign(shared_bytes + 128, (char)0xFF);
                run_block(&made);
            }
        }
    }
}

void *sebp_emulated_shared()
{
    return (void *)(((uintptr_t)shared.data() + 127) / 128 * 128);
}

int sebp_emulated_barrier(int value)
{
    meeting *at = &run->block;
    return at->result[meet(at, value)];
}

unsigned sebp_emulated_exchange(const void *mine, size_t bytes, void *all)
{
    meeting *at = &run->warps[run->running / 32];
    int room = (int)(at->round % 2), lane = (int)(run->running % 32);
    if (at->arrived == 0) {
        at->room[room].assign(32 * bytes, 0);
        at->there[room] = 0;
    }
    std::memcpy(at->room[room].data() + (size_t)lane * bytes, mine, bytes);
    at->there[room] |= 1U << lane;
    meet(at, 0);
    std::memcpy(all, at->room[room].data(), 32 * bytes);
    return at->there[room];
}

/* ---- the runtime's interface ---- */

cudaError_t cudaGetLastError(void)
{
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the emulated GPU";
}

const char *cudaGetErrorName(cudaError_t error)
{
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorEmulated";
}

cudaError_t cudaGetDeviceCount(int *count)
{
    if (fails())
        return finish(failure);
    *count = gpus;
    return gpus > 0 ? cudaSuccess : finish(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int *device)
{
    *device = current_gpu;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    if (device < 0 || device >= gpus)
        return finish(cudaErrorInvalidDevice);
    current_gpu = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int)
{
    if (fails())
        return finish(failure);
    switch (which) {
    case cudaDevAttrMultiProcessorCount:
        *value = 3;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = 8;
        break;
    case cudaDevAttrComputeCapabilityMinor:
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
    if (fails())
        return finish(failure);
    *pool = (cudaMemPool_t)pool;
    return cudaSuccess;
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t)
{
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, enum cudaMemPoolAttr, void *)
{
    return fails() ? finish(failure) : cudaSuccess;
}

cudaError_t cudaMalloc(void **memory, size_t bytes)
{
    return allocate(memory, bytes, false);
}

cudaError_t cudaFree(void *memory)
{
    return release(memory, false);
}

cudaError_t cudaMallocHost(void **memory, size_t bytes)
{
    return allocate(memory, bytes, true);
}

cudaError_t cudaFreeHost(void *memory)
{
    return release(memory, true);
}

cudaError_t cudaMallocFromPoolAsync(void **memory, size_t bytes, cudaMemPool_t, cudaStream_t)
{
    return allocate(memory, bytes, false);
}

cudaError_t cudaFreeAsync(void *memory, cudaStream_t)
{
    return release(memory, false);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t)
{
    if (fails())
        return finish(failure);
    bool to_gpu = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_gpu = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (to_gpu != is_on_gpu(to, bytes) || from_gpu != is_on_gpu(from, bytes))
        return finish(cudaErrorInvalidValue);
    opened memory;
    std::memmove(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t)
{
    if (fails())
        return finish(failure);
    if (!is_on_gpu(memory, bytes))
        return finish(cudaErrorInvalidValue);
    opened all;
    std::memset(memory, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(void *memory, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t)
{
    if (fails())
        return finish(failure);
    if (width == 0 || height == 0)
        return cudaSuccess;
    if (!is_on_gpu(memory, pitch * (height - 1) + width))
        return finish(cudaErrorInvalidValue);
    opened all;
    for (size_t i = 0; i < height; i++)
        std::memset((char *)memory + i * pitch, value, width);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer)
{
    if (fails())
        return finish(failure);
    const piece *found = find_piece(pointer);
    *attributes = cudaPointerAttributes{};
    attributes->type = found == nullptr ? cudaMemoryTypeUnregistered
                       : found->is_host ? cudaMemoryTypeHost
                                        : cudaMemoryTypeDevice;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    return fails() ? finish(failure) : cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *, enum cudaFuncAttribute, int)
{
    return fails() ? finish(failure) : cudaSuccess;
}

/* ---- what tests ask ---- */

void fake_cuda_fail_at(int64_t n, cudaError_t error)
{
    failing_call = n == 0 ? 0 : calls + n;
    failure = error;
    last_error = cudaSuccess;
}

int64_t fake_cuda_calls(void)
{
    return calls;
}

int64_t fake_cuda_live(void)
{
    return (int64_t)pieces.size();
}

void fake_cuda_have(int count)
{
    gpus = count;
}
