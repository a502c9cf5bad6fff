/* SPDX-License-Identifier: Apache-2.0 */
#include "rotated.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Real ones by Gram-Schmidt, twice, in double. */
sebp_matrix rotated_vectors(int64_t rank, int64_t size, testing_values values)
{
    sebp_matrix vectors = testing_matrix(rank, size, testing_stride(size), SEBP_F32);
    double *row = calloc((size_t)(rank * size), sizeof *row);
    ck_assert_ptr_nonnull(row);
    for (int64_t i = 0; i < rank; i++) {
        if (values == TESTING_INTEGER) {
            int64_t at; /* a column that no row before has */
            int taken;
            do {
                at = testing_between(0, size - 1);
                taken = 0;
                for (int64_t j = 0; j < i; j++) {
                    taken |= row[j * size + at] != 0;
                }
            } while (taken);
            row[i * size + at] = testing_chance(0.5) ? 1 : -1;
        } else {
            for (int64_t j = 0; j < size; j++) {
                row[i * size + j] = testing_uniform();
            }
            for (int64_t past = 0; past < 2 * i; past++) {
                const double *other = row + past % i * size;
                double dot = 0;
                for (int64_t j = 0; j < size; j++) {
                    dot += other[j] * row[i * size + j];
                }
                for (int64_t j = 0; j < size; j++) {
                    row[i * size + j] -= dot * other[j];
                }
            }
            double square = 0;
            for (int64_t j = 0; j < size; j++) {
                square += row[i * size + j] * row[i * size + j];
            }
            for (int64_t j = 0; j < size; j++) {
                row[i * size + j] /= sqrt(square);
            }
        }
        for (int64_t j = 0; j < size; j++) {
            testing_set(&vectors, i, j, row[i * size + j]);
        }
    }
    free(row);
    return vectors;
}

void rotated_basis(problem *p, testing_values values)
{
    p->u_out = rotated_vectors(p->p, p->N, values);
    p->u_in = rotated_vectors(p->q, p->K, values);
    ck_assert_int_eq(sebp_basis_from_vectors(&p->u_out, &p->u_in, &p->basis), SEBP_SUCCESS);
}

problem rotated_problem(int64_t M, int64_t N, int64_t K, sebp_dtype dtype, testing_values values)
{
    problem p = {.M = M, .N = N, .K = K, .options = SEBP_LINEAR_OPTIONS_INIT};
    p.p = testing_chance(0.3) ? N : testing_between(1, N);
    p.q = testing_chance(0.3) ? K : testing_between(1, K);
    rotated_basis(&p, values);
    p.dy = testing_random_matrix(M, N, dtype, values);
    testing_zero_rows(&p.dy, testing_chance(0.1) ? 0 : 0.6);
    const sebp_rule rule = sebp_rule_nonzero();
    p.active = reference_rows_find(&p.dy, &rule);
    if (testing_chance(0.7)) {
        ck_assert_int_eq(sebp_rows_from_indices(p.active.indices, p.active.count, M, &p.rows),
                         SEBP_SUCCESS);
        p.options.x_is_compact = testing_chance(0.5);
    }
    p.x = testing_random_matrix(p.options.x_is_compact ? p.active.count : M, K, dtype, values);
    for (int64_t i = 0; i < M && !p.options.x_is_compact; i++) {
        if (!reference_rows_have(&p.active, i)) { /* what must not be read */
            testing_set(&p.x, i, testing_between(0, K - 1), NAN);
        }
    }
    return p;
}

void rotated_free(problem *p)
{
    sebp_basis_destroy(p->basis);
    sebp_rows_destroy(p->rows);
    reference_rows_free(&p->active);
    testing_release(&p->u_out);
    testing_release(&p->u_in);
    testing_release(&p->dy);
    testing_release(&p->x);
}

sebp_status rotated_gradient(sebp_context *context, const problem *p, int rotation,
                             const sebp_matrix *r)
{
    return sebp_sparsegrad_gradient(context, p->basis, &p->dy, &p->x, p->rows, &p->options,
                                    (sebp_rotation)rotation, r);
}

sebp_sparse rotated_sparse(int64_t rows, int64_t cols, double chance, testing_values values)
{
    sebp_matrix numbers = testing_matrix(1, rows * cols, rows * cols, SEBP_F32);
    testing_fill(&numbers, values);
    int64_t count = 0, *indices = malloc((size_t)(rows * cols) * sizeof *indices);
    ck_assert_ptr_nonnull(indices);
    for (int64_t i = 0; i < rows * cols; i++) {
        if (testing_chance(chance)) {
            indices[count++] = i;
        }
    }
    if (count == 0) {
        indices[count++] = 0;
    }
    sebp_sparse made = testing_sparse(count, rows, cols);
    memcpy(made.indices, indices, (size_t)count * sizeof *indices);
    memcpy(made.values, numbers.data, (size_t)count * sizeof(float));
    free(indices);
    testing_release(&numbers);
    return made;
}
