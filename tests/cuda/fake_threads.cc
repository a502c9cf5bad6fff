/* SPDX-License-Identifier: Apache-2.0 */
/** @file fake_threads.cc The threads of a GPU that is not there: fibers, block after block. */
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include <ucontext.h>

#include <cuda_runtime.h>

#include "fake_inside.h"

/* AddressSanitizer is told which stack comes next, and where it came from. */
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#define LEAVE(keeps, stack, bytes) __sanitizer_start_switch_fiber(keeps, stack, bytes)
#define ARRIVE(kept, stack, bytes) __sanitizer_finish_switch_fiber(kept, stack, bytes)
#else
#define LEAVE(keeps, stack, bytes) ((void)(keeps), (void)(stack), (void)(bytes))
#define ARRIVE(kept, stack, bytes) ((void)(kept), (void)(stack), (void)(bytes))
#endif

namespace {

constexpr size_t STACK_BYTES = 256 << 10;

struct fiber {
    ucontext_t context;
    jmp_buf at;
    dim3 thread;
    bool has_started, is_done;
    std::unique_ptr<char[]> stack;
    void *kept; /* the sanitizer's */
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
    const void *scheduler_stack;
    size_t scheduler_bytes;
    void *scheduler_kept;
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
    fiber &mine = run->fibers[run->running];
    LEAVE(&mine.kept, run->scheduler_stack, run->scheduler_bytes);
    if (_setjmp(mine.at) == 0)
        _longjmp(run->scheduler, 1);
    ARRIVE(run->fibers[run->running].kept, &run->scheduler_stack, &run->scheduler_bytes);
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
    ARRIVE(nullptr, &run->scheduler_stack, &run->scheduler_bytes);
    (*run->body)();
    run->fibers[run->running].is_done = true;
    run->progress++;
    meeting *warp = &run->warps[run->running / 32];
    run->block.members--;
    warp->members--;
    close_round(&run->block);
    close_round(warp);
    LEAVE(nullptr, run->scheduler_stack, run->scheduler_bytes);
    _longjmp(run->scheduler, 1);
}

void resume(size_t which)
{
    run->running = which;
    fiber &next = run->fibers[which];
    threadIdx = next.thread;
    LEAVE(&run->scheduler_kept, next.stack.get(), STACK_BYTES);
    if (_setjmp(run->scheduler) != 0) {
        ARRIVE(run->scheduler_kept, nullptr, nullptr);
        return;
    }
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

cudaError_t sebp_emulate_grid(dim3 grid, dim3 block, size_t shared_bytes,
                              const std::function<void()> &body)
{
    MAY_FAIL();
    fake_opened memory;
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
    return cudaSuccess;
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
