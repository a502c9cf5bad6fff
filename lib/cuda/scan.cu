/* SPDX-License-Identifier: Apache-2.0 */
/** @file scan.cu What the rows of a gradient hold, by which a rule finds the active ones. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <cmath>

#include "operations.h"
#include "packs.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / SEBP_WARP;
constexpr int SCAN_PACKS = 4;       /* that a thread reads between two looks at what it has found */
constexpr int SCAN_PIECE = 1 << 10; /* elements worth a warp of their own */
constexpr int SCAN_ROWS = 256 << 10; /* at a time, at most: their scores are in scratch memory */
constexpr int DIRECT_SCORES = SEBP_CUDA_RESULT_BYTES / (int)sizeof(double);

/* Rows are cut into pieces, a warp to each: there may be a single long one. */
struct row_pieces {
    int64_t rows, cols;
    int64_t pieces, piece_cols; /* of a row */
};

__device__ __forceinline__ bool is_found(float x, sebp_measure measure, float limit)
{
    if (measure == SEBP_MEASURE_NONZERO)
        return (__float_as_uint(x) & 0x7FFFFFFF) != 0;
    return !(fabsf(x) <= limit);
}

/* score: rows x pieces. */
template <class T, sebp_measure MEASURE>
__global__ void __launch_bounds__(THREADS)
    scan_kernel(sebp_view<const T> dy, bool is_packed, row_pieces cut, float limit, double *score)
{
    constexpr int N = SEBP_PACKED<T>;
    const int lane = (int)threadIdx.x % SEBP_WARP;
    int64_t task = (int64_t)blockIdx.x * WARPS + (int)threadIdx.x / SEBP_WARP;
    if (task >= cut.rows * cut.pieces)
        return;
    const T *row = dy.row(task / cut.pieces);
    int64_t at = task % cut.pieces * cut.piece_cols, end = at + cut.piece_cols;
    if (end > cut.cols)
        end = cut.cols;
    double sum = 0;
    bool found = false;
    for (; at < end; at += SCAN_PACKS * SEBP_WARP * N) {
        sebp_pack<T, N> packs[SCAN_PACKS];
        for (int i = 0; i < SCAN_PACKS; i++) {
            packs[i] = sebp_load_pack<N>(row, at + (i * SEBP_WARP + lane) * N, end, is_packed);
        }
        for (int i = 0; i < SCAN_PACKS; i++) {
            for (int j = 0; j < N; j++) {
                float x = sebp_widen(packs[i].at[j]);
                if (MEASURE == SEBP_MEASURE_SQUARE_SUM)
                    sum += (double)x * (double)x;
                else
                    found = found || is_found(x, MEASURE, limit);
            }
        }
        if (MEASURE != SEBP_MEASURE_SQUARE_SUM && __any_sync(0xFFFFFFFFU, found))
            break;
    }
    if (MEASURE == SEBP_MEASURE_SQUARE_SUM)
        sum = sebp_warp_sum(sum);
    else
        sum = __any_sync(0xFFFFFFFFU, found) ? 1 : 0;
    if (lane == 0)
        score[task] = isfinite(sum) ? sum : (double)INFINITY;
}

template <class T>
sebp_status launch_scan(sebp_cuda *cuda, const sebp_matrix *dy, sebp_measure measure, float limit,
                        const row_pieces &cut, double *score)
{
    auto kernel = measure == SEBP_MEASURE_NONZERO ? scan_kernel<T, SEBP_MEASURE_NONZERO>
                  : measure == SEBP_MEASURE_ABOVE ? scan_kernel<T, SEBP_MEASURE_ABOVE>
                                                  : scan_kernel<T, SEBP_MEASURE_SQUARE_SUM>;
    dim3 grid((unsigned)sebp_div_ceil(cut.rows * cut.pieces, WARPS));
    return sebp_launch(cuda, kernel, grid, THREADS, 0, sebp_view_of<const T>(dy),
                       sebp_is_packed<T>(dy), cut, limit, score);
}

sebp_status scan(sebp_cuda *cuda, const sebp_matrix *dy, sebp_measure measure, float limit,
                 const row_pieces &cut, double *score)
{
    return sebp_with_dtype(dy->dtype, [&](auto element) {
        return launch_scan<decltype(element)>(cuda, dy, measure, limit, cut, score);
    });
}

/* The largest float that is not above `limit`. For a float v, |v| > limit if and only if |v| >
 * that. */
float float_below(double limit)
{
    float nearest = (float)limit;
    return (double)nearest > limit || std::isinf(nearest) ? std::nextafterf(nearest, 0.0f)
                                                          : nearest;
}

/* Few scores: kernels write them into memory of the host's, which saves a copy. */
sebp_status scan_few(sebp_cuda *cuda, const sebp_matrix *dy, sebp_measure measure, float limit,
                     double *score)
{
    row_pieces cut{dy->rows, dy->cols, 1, dy->cols};
    int64_t most = sebp_div_ceil(dy->cols, SCAN_PIECE);
    int64_t pieces = sebp_max(sebp_min(DIRECT_SCORES / dy->rows, most), 1);
    cut.piece_cols = sebp_max(sebp_div_ceil(most, pieces), 1) * SCAN_PIECE;
    cut.pieces = sebp_max(sebp_div_ceil(dy->cols, cut.piece_cols), 1);
    double *found = (double *)cuda->results;
    sebp_status status = scan(cuda, dy, measure, limit, cut, found);
    if (status == SEBP_SUCCESS)
        status = sebp_cuda_synchronize(cuda);
    if (status != SEBP_SUCCESS)
        return status;
    for (int64_t i = 0; i < dy->rows; i++) {
        double sum = 0;
        for (int64_t piece = 0; piece < cut.pieces; piece++)
            sum += *found++;
        score[i] = measure == SEBP_MEASURE_SQUARE_SUM ? sum : sum > 0;
    }
    return SEBP_SUCCESS;
}

} // namespace

sebp_status sebp_cuda_scan_rows(void *device, const sebp_matrix *dy, sebp_measure measure,
                                double limit, double *score)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    float below = float_below(limit);
    if (dy->rows == 0)
        return SEBP_SUCCESS;
    if (dy->rows <= DIRECT_SCORES)
        return scan_few(cuda, dy, measure, below, score);
    /* No fewer than the direct ones: a workspace of 1 MiB has room for more beside a method's half. */
    const int64_t room = sebp_cuda_workspace(cuda) / (int64_t)sizeof(double);
    int64_t chunk = sebp_min(dy->rows, sebp_min(SCAN_ROWS, sebp_max(room, DIRECT_SCORES)));
    sebp_status status;
    double *found = (double *)sebp_cuda_scratch(cuda, chunk * (int64_t)sizeof *found, &status);
    if (status != SEBP_SUCCESS)
        return status;
    sebp_matrix some = *dy;
    for (int64_t first = 0; first < dy->rows; first += chunk) {
        some.data = (char *)dy->data + first * dy->stride * (int64_t)sebp_dtype_bytes(dy->dtype);
        some.rows = sebp_min(chunk, dy->rows - first);
        status =
            scan(cuda, &some, measure, below, row_pieces{some.rows, dy->cols, 1, dy->cols}, found);
        if (status == SEBP_SUCCESS) {
            status =
                sebp_cuda_download(cuda, score + first, found, some.rows * (int64_t)sizeof *found);
        }
        if (status != SEBP_SUCCESS)
            return status;
    }
    return SEBP_SUCCESS;
}
