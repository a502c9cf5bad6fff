/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file gathered_product.c
 * Products of listed rows of f32 by cuBLASLt: the rows are gathered in scratch memory, and those of C
 * are put where they belong afterwards. That moves few bytes for each multiply-add, and cuBLASLt does
 * more of these in a second than the library's own kernels of f32 (doc/performance.md).
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "operations.h"
#include "product.h"

enum { ALIGNMENT = 256 };

/* Gives listed rows a place of their own in `room`, whole lines of 16 bytes. */
static void place(sebp_operand *operand, int64_t rows, int64_t cols, char *room, int64_t *end)
{
    if (operand->rows == NULL)
        return;
    operand->data = room + *end;
    operand->rows = NULL;
    operand->stride = sebp_round_up(cols, 4);
    *end += sebp_round_up(rows * operand->stride * (int64_t)sizeof(float), ALIGNMENT);
}

/* What a matrix of the product has in memory. */
static int64_t rows_of_a(const sebp_product *product)
{
    return product->a.transposed ? product->k : product->m;
}

static int64_t rows_of_b(const sebp_product *product)
{
    return product->b.transposed ? product->n : product->k;
}

/* The product of whole matrices behind one of listed rows. The bytes of `room` that it takes. */
static int64_t make_whole(const sebp_product *product, char *room, sebp_product *whole)
{
    int64_t end = 0;
    *whole = *product;
    place(&whole->a, rows_of_a(product), product->m + product->k - rows_of_a(product), room, &end);
    place(&whole->b, rows_of_b(product), product->k + product->n - rows_of_b(product), room, &end);
    if (product->c_rows != NULL) {
        whole->c = room + end;
        whole->c_rows = NULL;
        whole->c_stride = sebp_round_up(product->n, 4);
        whole->accumulate = false;
        end += sebp_round_up(product->m * whole->c_stride * (int64_t)sizeof(float), ALIGNMENT);
    }
    return end;
}

bool sebp_cuda_plan_gathered(sebp_cuda *cuda, const sebp_product *product, sebp_cublas_plan *plan,
                             int64_t *scratch_bytes)
{
    const double work = (double)product->m * (double)product->n * (double)product->k;
    sebp_product whole;
    if (product->a.dtype != SEBP_F32 || product->b.dtype != SEBP_F32 ||
        product->c_dtype != SEBP_F32 ||
        work < cuda->min_gathered_work / (sebp_cuda_takes_tf32(product) ? 4 : 1))
        return false;
    /* An address as aligned as scratch memory is. */
    const int64_t bytes = make_whole(product, (char *)(uintptr_t)ALIGNMENT, &whole);
    if (bytes > sebp_cuda_workspace(cuda) || !sebp_cublas_takes(cuda, &whole) ||
        !sebp_cublas_plan_product(cuda, &whole, plan))
        return false;
    *scratch_bytes = bytes + plan->scratch_bytes;
    return *scratch_bytes <= sebp_cuda_workspace(cuda);
}

/* Copies listed rows to their place. */
static sebp_status gather(sebp_cuda *cuda, const sebp_operand *operand, int64_t rows, int64_t cols,
                          const sebp_operand *to)
{
    if (operand->rows == NULL)
        return SEBP_SUCCESS;
    sebp_matrix from = sebp_matrix_f32((float *)(uintptr_t)operand->data, rows, cols);
    sebp_matrix made = sebp_matrix_f32((float *)(uintptr_t)to->data, rows, cols);
    from.stride = operand->stride;
    made.stride = to->stride;
    return sebp_cuda_widen_rows(cuda, &from, operand->rows, NULL, rows, &made);
}

sebp_status sebp_cuda_run_gathered(sebp_cuda *cuda, const sebp_product *product,
                                   const sebp_cublas_plan *plan, void *scratch)
{
    const int64_t a_rows = rows_of_a(product), b_rows = rows_of_b(product);
    sebp_product whole;
    const int64_t bytes = make_whole(product, scratch, &whole);
    sebp_status status =
        gather(cuda, &product->a, a_rows, product->m + product->k - a_rows, &whole.a);
    if (status == SEBP_SUCCESS)
        status = gather(cuda, &product->b, b_rows, product->k + product->n - b_rows, &whole.b);
    if (status == SEBP_SUCCESS)
        status = sebp_cublas_run_product(cuda, &whole, plan, (char *)scratch + bytes);
    if (status != SEBP_SUCCESS || product->c_rows == NULL)
        return status;
    sebp_matrix made = sebp_matrix_f32(whole.c, product->m, product->n);
    sebp_matrix c = sebp_matrix_f32(product->c, product->m, product->n);
    made.stride = whole.c_stride;
    c.stride = product->c_stride;
    return sebp_cuda_put_rows(cuda, &made, product->c_rows, &c, product->accumulate);
}
