/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file plain_product.cu
 * Products by f32 multiply-adds, of f32 and bf16, wherever they lie.
 *
 * A block has a tile of C, a thread a part of it in registers. Slices of A and B, a few ahead of those
 * that are multiplied, are copied to shared memory, where each step of the depth is a row. All blocks
 * take the same number of slices, from wherever in the list of all tiles' slices: so every
 * multiprocessor is busy to the end, however many tiles there are. Of a tile that several blocks have
 * parts of the last one to come adds the parts, in their order.
 */
#include "plain_kernel.cuh"

namespace {

/* Tiles for much work, for less, and for little. A thread's part of the last is smaller, as there are
 * too few blocks for a multiprocessor to have many threads. */
using large_tile = plain::shape<128, 128, 8, 8, 16, 3, 2, false>;
using flat_tile = plain::shape<64, 128, 8, 8, 16, 4, 3, false>;
using small_tile = plain::shape<64, 64, 4, 8, 16, 4, 4, true>;

enum { LARGE, FLAT, SMALL, TILES };

/* What is known of a tile: its sides, blocks in a multiprocessor, and the relative time that a
 * multiply-add takes, measured on an H200. */
struct kind {
    int64_t rows, cols, resident;
    double cost;
};

template <class S> constexpr kind kind_of(double cost)
{
    return {S::rows, S::cols, S::resident, cost};
}

constexpr kind KINDS[TILES] = {kind_of<large_tile>(1.0), kind_of<flat_tile>(0.99),
                               kind_of<small_tile>(1.25)};
constexpr int64_t STEP = large_tile::step;
constexpr int64_t MIN_STEPS = 8; /* of a block, that its start and its end are worth it */
constexpr double PART_STEPS = 6; /* what it costs to leave a part and to add parts, in steps */

/* How a product is cut into tiles of one kind, and the time that it takes, in steps of an element. */
sebp_plain_cut cut_by(int which, const sebp_cuda *cuda, const sebp_product *product, double *time)
{
    const kind &tile = KINDS[which];
    /* Where both factors are transposed on their way, flat tiles take more of it. */
    const bool turns_both = !product->a.transposed && product->b.transposed;
    const double cost = which == FLAT && turns_both ? 1.12 : tile.cost;
    sebp_plain_cut made{};
    made.kind = which;
    made.tiles_down = sebp_div_ceil(product->m, tile.rows);
    made.tiles_across = sebp_div_ceil(product->n, tile.cols);
    made.steps = sebp_max(sebp_div_ceil(product->k, STEP), 1);
    const int64_t tiles = made.tiles_down * made.tiles_across;
    const int64_t slots = tile.resident * cuda->multiprocessors;
    const int64_t waves = sebp_div_ceil(tiles, slots);
    const double whole = (double)(waves * made.steps);
    /* Shared evenly: as many blocks as run at once, unless each would have too little. */
    const int64_t blocks = sebp_max(sebp_min(slots, tiles * made.steps / MIN_STEPS), 1);
    const double shared = (double)sebp_div_ceil(tiles * made.steps, blocks) + PART_STEPS;
    made.blocks = shared < whole ? blocks : tiles;
    /* Blocks that are alone in a multiprocessor have more of it. */
    const double busy = (double)sebp_div_ceil(sebp_min(made.blocks, slots), cuda->multiprocessors);
    *time = (shared < whole ? shared : whole) * (double)(tile.rows * tile.cols) * cost * busy;
    return made;
}

/* Whether C is f32 whose groups of four can be stored at once, and nothing else is wanted. */
bool stores_fours(const sebp_product *product)
{
    return product->c_dtype == SEBP_F32 && (uintptr_t)product->c % 16 == 0 &&
           product->c_stride % 4 == 0 && product->n % 4 == 0 && product->bias == nullptr &&
           product->residual == nullptr && product->before == nullptr &&
           product->activated == nullptr;
}

template <class S, bool a_rows, bool a_bf16, bool b_rows, bool b_bf16>
sebp_status launch(sebp_cuda *cuda, const sebp_product *product, const sebp_plain_cut *cut,
                   unsigned *counters, float *partial)
{
    return sebp_launch_overlapping(
        cuda, plain::multiply<S, a_rows, a_bf16, b_rows, b_bf16>, dim3((unsigned)cut->blocks),
        dim3(S::threads), plain::shared_bytes<S, a_rows, b_rows>(),
        plain::factor_of(product->a, false, product->m, product->k),
        plain::factor_of(product->b, true, product->n, product->k), *cut,
        sebp_cuda_epilogue_of(product), stores_fours(product), counters, partial);
}

template <class S>
sebp_status run_f32(sebp_cuda *cuda, const sebp_product *product, const sebp_plain_cut *cut,
                    unsigned *counters, float *partial)
{
    return sebp_with_bool(!product->a.transposed, [&](auto a_rows) {
        return sebp_with_bool(product->b.transposed, [&](auto b_rows) {
            return launch<S, a_rows, false, b_rows, false>(cuda, product, cut, counters, partial);
        });
    });
}

/* Whether tiles of one kind alone will do: with bf16, which comes here where tensor cores cannot take
 * it, and where f32 cannot be copied as it lies. */
bool is_odd(const sebp_product *product)
{
    const plain::factor a = plain::factor_of(product->a, false, product->m, product->k);
    const plain::factor b = plain::factor_of(product->b, true, product->n, product->k);
    return a.is_bf16 || b.is_bf16 || !(a.lanes_are_rows || a.is_aligned) ||
           !(b.lanes_are_rows || b.is_aligned);
}

sebp_status run_odd(sebp_cuda *cuda, const sebp_product *product, const sebp_plain_cut *cut,
                    unsigned *counters, float *partial)
{
    return sebp_with_bool(!product->a.transposed, [&](auto a_rows) {
        return sebp_with_bool(product->a.dtype == SEBP_BF16, [&](auto a_bf16) {
            return sebp_with_bool(product->b.transposed, [&](auto b_rows) {
                return sebp_with_bool(product->b.dtype == SEBP_BF16, [&](auto b_bf16) {
                    return launch<small_tile, a_rows, a_bf16, b_rows, b_bf16>(cuda, product, cut,
                                                                              counters, partial);
                });
            });
        });
    });
}

int64_t counter_bytes(const sebp_plain_cut *cut)
{
    return sebp_round_up(cut->tiles_down * cut->tiles_across * (int64_t)sizeof(unsigned), 256);
}

/* Whether blocks have but parts of tiles. */
bool is_shared(const sebp_plain_cut *cut)
{
    return cut->tiles_down * cut->tiles_across % cut->blocks != 0;
}

} // namespace

sebp_plain_cut sebp_cuda_cut_plain(const sebp_cuda *cuda, const sebp_product *product)
{
    double time = 0, best_time = 0;
    sebp_plain_cut best = cut_by(SMALL, cuda, product, &best_time);
    for (int which = 0; which < SMALL && !is_odd(product); which++) {
        sebp_plain_cut made = cut_by(which, cuda, product, &time);
        if (time < best_time) {
            best = made;
            best_time = time;
        }
    }
    return best;
}

int64_t sebp_cuda_plain_bytes(const sebp_plain_cut *cut)
{
    const kind &tile = KINDS[cut->kind];
    if (!is_shared(cut))
        return 0;
    return counter_bytes(cut) + 2 * cut->blocks * tile.rows * tile.cols * (int64_t)sizeof(float);
}

void sebp_cuda_plain_whole(sebp_plain_cut *cut)
{
    cut->blocks = cut->tiles_down * cut->tiles_across;
}

sebp_status sebp_cuda_run_plain(sebp_cuda *cuda, const sebp_product *product,
                                const sebp_plain_cut *cut, void *scratch)
{
    unsigned *counters = (unsigned *)scratch;
    float *partial = (float *)((char *)scratch + counter_bytes(cut));
    if (is_shared(cut)) {
        /* No part of any tile has been summed. */
        sebp_status status = sebp_cuda_check(
            cuda, cudaMemsetAsync(scratch, 0, (size_t)counter_bytes(cut), cuda->stream));
        if (status != SEBP_SUCCESS)
            return status;
    }
    if (is_odd(product))
        return run_odd(cuda, product, cut, counters, partial);
    if (cut->kind == LARGE)
        return run_f32<large_tile>(cuda, product, cut, counters, partial);
    if (cut->kind == FLAT)
        return run_f32<flat_tile>(cuda, product, cut, counters, partial);
    return run_f32<small_tile>(cuda, product, cut, counters, partial);
}
