/* SPDX-License-Identifier: Apache-2.0 */
/** @file fake_threads.cc The threads of a GPU that is not there: fibers, block after block. */
#undef _FORTIFY_SOURCE /* with which longjmp() refuses another stack */
#include <algorithm>
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

/* A place to go on from. The compiler's own jumps: setcontext() asks the kernel each time, and the sanitizer
 * takes longjmp() for the end of all frames and cleans the whole stack. The compiler may conclude nothing
 * from what a function with such jumps seems to do: to memory, or to registers. */
#ifdef __x86_64__
#define STAY(place) (__builtin_setjmp(place) == 0)
#define JUMP(place) __builtin_longjmp(place, 1)
typedef void *place[5];
#else
#include <csetjmp>
#define STAY(place) (_setjmp(place) == 0)
#define JUMP(place) _longjmp(place, 1)
typedef jmp_buf place;
#endif
#ifdef __clang__
#define JUMPS __attribute__((noinline, no_sanitize("address")))
#else
#define JUMPS __attribute__((noipa, no_sanitize("address")))
#endif

namespace {

constexpr size_t STACK_BYTES = 256 << 10;

struct async_copy {
    void *to;
    const void *from;
    int bytes, size;
    int64_t group;
};

/* Runs one thread of a block after another, for as long as the program does. */
struct fiber {
    place at;
    dim3 thread;
    bool is_done;
    std::vector<async_copy> copies; /* under way, from `first_copy` on */
    size_t first_copy;
    int64_t groups;                /* of copies, that have ended */
    std::unique_ptr<char[]> stack; /* null: it has never run */
    void *kept;                    /* the sanitizer's */
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
    size_t threads;
    meeting block;
    std::vector<meeting> warps;
    const std::function<void()> *body;
    size_t running;
    place scheduler;
    const void *scheduler_stack;
    size_t scheduler_bytes;
    void *scheduler_kept;
    int64_t progress; /* waits that are over, and threads that have returned */
};

std::vector<fiber> fibers;
block_run *run;
int64_t blocks_run, grids_run;
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

/* A function of its own: these jumps may not be where their place is. */
JUMPS void go(place *to)
{
    __asm__ volatile("" ::: "memory");
    JUMP(*to);
}

JUMPS void jump_to_scheduler()
{
    if (STAY(fibers[run->running].at))
        go(&run->scheduler);
}

void yield()
{
    LEAVE(&fibers[run->running].kept, run->scheduler_stack, run->scheduler_bytes);
    jump_to_scheduler();
    ARRIVE(fibers[run->running].kept, &run->scheduler_stack, &run->scheduler_bytes);
    threadIdx = fibers[run->running].thread;
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

/* Does the thread's copies of the groups below `end`. */
void do_copies(fiber *of, int64_t end)
{
    for (; of->first_copy < of->copies.size(); of->first_copy++) {
        const async_copy &copy = of->copies[of->first_copy];
        if (copy.group >= end)
            return;
        std::memset(copy.to, 0, (size_t)copy.size);
        if (copy.bytes > 0)
            std::memcpy(copy.to, copy.from, (size_t)copy.bytes);
    }
    of->copies.clear();
    of->first_copy = 0;
}

void run_threads()
{
    ARRIVE(nullptr, &run->scheduler_stack, &run->scheduler_bytes);
    for (;;) {
        (*run->body)();
        do_copies(&fibers[run->running], INT64_MAX);
        fibers[run->running].is_done = true;
        run->progress++;
        meeting *warp = &run->warps[run->running / 32];
        run->block.members--;
        warp->members--;
        close_round(&run->block);
        close_round(warp);
        yield();
    }
}

/* On the fiber's stack, for the first time. This frame is never returned to: nothing of it is watched. */
JUMPS void start(fiber *which)
{
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = which->stack.get();
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, run_threads, 0);
    setcontext(&context);
}

JUMPS void jump_to_fiber(fiber *which, bool is_new)
{
    if (STAY(run->scheduler)) {
        if (is_new)
            start(which);
        go(&which->at);
    }
}

void resume(size_t which)
{
    run->running = which;
    fiber *next = &fibers[which];
    bool is_new = next->stack == nullptr;
    if (is_new)
        next->stack = std::unique_ptr<char[]>(new char[STACK_BYTES]);
    threadIdx = next->thread;
    LEAVE(&run->scheduler_kept, next->stack.get(), STACK_BYTES);
    jump_to_fiber(next, is_new);
    ARRIVE(run->scheduler_kept, nullptr, nullptr);
}

/* A warp goes on as far as it can without the others. Whether any of its threads has not returned. */
bool run_warp(size_t warp, bool backwards)
{
    const size_t first = warp * 32, count = std::min(run->threads - first, (size_t)32);
    for (;;) {
        const int64_t before = run->progress;
        bool goes_on = false;
        for (size_t i = 0; i < count; i++) {
            const size_t which = first + (backwards ? count - 1 - i : i);
            if (!fibers[which].is_done) {
                goes_on = true;
                resume(which);
            }
        }
        if (!goes_on || run->progress == before)
            return goes_on;
    }
}

void run_block()
{
    size_t count = run->threads;
    run->block = meeting{(int)count, 0, 0, {0, 0}, 0, {}, {0, 0}};
    run->warps.assign((count + 31) / 32, meeting{});
    for (size_t i = 0; i < count; i++) {
        run->warps[i / 32].members++;
        fibers[i].is_done = false;
        fibers[i].groups = 0;
        fibers[i].thread = dim3((unsigned)(i % blockDim.x), (unsigned)(i / blockDim.x % blockDim.y),
                                (unsigned)(i / blockDim.x / blockDim.y));
    }
    const bool backwards = blocks_run % 2 != 0;
    const size_t warps = run->warps.size();
    for (bool goes_on = true; goes_on;) {
        const int64_t before = run->progress;
        goes_on = false;
        for (size_t i = 0; i < warps; i++)
            goes_on = run_warp(backwards ? warps - 1 - i : i, backwards) || goes_on;
        if (goes_on && run->progress == before) {
            std::fprintf(stderr, "emulated GPU: threads of a block wait for each other for ever\n");
            std::abort();
        }
    }
    blocks_run++;
}

} // namespace

dim3 threadIdx, blockIdx, blockDim, gridDim;

cudaError_t sebp_emulate_grid(dim3 grid, dim3 block, size_t shared_bytes,
                              const std::function<void()> &body)
{
    MAY_FAIL();
    fake_opened memory;
    block_run made{};
    made.threads = (size_t)block.x * block.y * block.z;
    made.body = &body;
    run = &made;
    if (fibers.size() < made.threads)
        fibers.resize(made.threads);
    gridDim = grid;
    blockDim = block;
    const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks; i++) {
        const uint64_t at = grids_run % 2 == 0 ? i : blocks - 1 - i;
        blockIdx = dim3((unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y),
                        (unsigned)(at / grid.x / grid.y));
        shared.assign(shared_bytes + 128, (char)0xFF);
        run_block();
    }
    grids_run++;
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

void sebp_emulated_copy(void *to, const void *from, int bytes, int size)
{
    fiber *mine = &fibers[run->running];
    std::memset(to, 0xFF, (size_t)size);
    mine->copies.push_back({to, from, bytes, size, mine->groups});
}

void sebp_emulated_copies_end_group()
{
    fibers[run->running].groups++;
}

void sebp_emulated_copies_wait(int groups)
{
    fiber *mine = &fibers[run->running];
    do_copies(mine, mine->groups - groups);
}
