/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file basis.h
 * The bases in which a layer's weight gradient is sparse, made from the gradients of some steps.
 *
 * SparseGrad (Chekalina, Rudenko, Mezentsev, Mikhalev, Panchenko, Oseledets, EMNLP 2024) takes the
 * weight gradients G_t (N x K) of layers of one kind. Their HOSVD (higher-order SVD) consists of
 *
 *     u_out (N x N)  the eigenvectors of  sum over t of G_t G_t^T     (N x N)
 *     u_in  (K x K)  the eigenvectors of  sum over t of G_t^T G_t     (K x K)
 *
 * in descending order of eigenvalues. Each gradient is added to both sums when it comes, and no G_t
 * is kept. A basis has all eigenvectors of each sum, or the leading r_out and r_in of them. The
 * share of sum ||G_t||^2 that lies in the leading ones is reported: the sum of their eigenvalues
 * over that of all.
 *
 * Sums are held and solved in f32, as the gradients are f32 sums themselves. Double precision would
 * take twice the memory. It would only improve the smallest eigenvalues, whose directions hold
 * nothing but noise. The sums for one kind of layer of BERT-base take 40 MB.
 *
 * LAPACK solves the eigenproblem (ssyevr and ssyevd, through LAPACKE), on the threads of its BLAS.
 * If these are OpenMP's, they are limited to the number of the context's threads, and to one where
 * the context has a parallel_for or a fork has left threads behind (context.h). A BLAS with threads
 * of its own is not limited, nor is any BLAS by a build without OpenMP. With another number of
 * threads vectors may round differently.
 */
#ifndef SEBP_BASIS_H
#define SEBP_BASIS_H

#include <stdint.h>

#include <sebp/context.h>
#include <sebp/matrix.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/* ---- gradients, summed ---- */

/**
 * The two sums over gradients of one shape. They belong to no context and are used by one thread at
 * a time. Each gradient adds up to max(N, K) products to each of their elements. The sums are full
 * after 2^30 such products, or 2^63 where all are zero.
 */
typedef struct sebp_basis_sums sebp_basis_sums;

/**
 * Makes empty sums. Memory: 4 (N^2 + K^2) bytes.
 *
 * @param out_features  N, at least 1.
 * @param in_features   K, at least 1.
 * @param sums          where they are put, untouched on error; free them with
 *                      sebp_basis_sums_destroy().
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE (below 1); SEBP_ERROR_OVERFLOW;
 *         SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_basis_sums_create(int64_t out_features, int64_t in_features,
                                            sebp_basis_sums **sums);

/**
 * Adds G G^T and G^T G. Only one half of each symmetric sum is computed: N K (N + K) flop and a
 * little more.
 *
 * @param gradient  G: N x K, either dtype, any stride.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; a status of sebp_matrix_check(); SEBP_ERROR_SHAPE;
 *         SEBP_ERROR_NONFINITE (G holds a NaN or Inf, or sum ||G_t||^2 would leave the range of
 *         f32); SEBP_ERROR_OVERFLOW (the sums are full); SEBP_ERROR_MEMORY;
 *         SEBP_ERROR_BACKEND. On all but the last the sums are as they were.
 */
SEBP_API sebp_status sebp_basis_sums_add(sebp_context *context, sebp_basis_sums *sums,
                                         const sebp_matrix *gradient);

/** How many gradients were added. 0 for NULL. */
SEBP_API int64_t sebp_basis_sums_count(const sebp_basis_sums *sums);

/**
 * Copies sums out, for a checkpoint within the basis phase; their count is
 * sebp_basis_sums_count().
 *
 * @param energy  sum ||G_t||^2.
 * @param out     sum G_t G_t^T: N x N, f32, any stride.
 * @param in      sum G_t^T G_t: K x K, f32, any stride; overlaps nothing.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; a status of sebp_matrix_check(); SEBP_ERROR_DTYPE (not
 *         f32); SEBP_ERROR_SHAPE; SEBP_ERROR_ALIAS.
 */
SEBP_API sebp_status sebp_basis_sums_export(const sebp_basis_sums *sums, double *energy,
                                            const sebp_matrix *out, const sebp_matrix *in);

/**
 * Replaces what the sums hold by exported sums. What follows is then the same, bit for bit. Only
 * the upper triangles of both matrices are used; what is below the diagonal may be anything.
 *
 * Damaged sums are refused as far as damage can be seen. No element of a diagonal may be negative,
 * and the sum of each diagonal has to be `energy`. The square of any other element may not exceed
 * the product of the two diagonal elements in its row and its column. Both are tested up to the
 * rounding of count * K and of count * N products.
 *
 * @param count   gradients in them, >= 0.
 * @param energy  as exported: finite, >= 0; 0 where count is 0.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; a status of sebp_matrix_check(); SEBP_ERROR_DTYPE (not
 *         f32); SEBP_ERROR_VALUE (count, energy, an element); SEBP_ERROR_SHAPE;
 *         SEBP_ERROR_OVERFLOW (more gradients than the sums take); SEBP_ERROR_NONFINITE (an upper
 *         triangle holds a NaN or Inf). On error the sums are as they were.
 */
SEBP_API sebp_status sebp_basis_sums_import(sebp_basis_sums *sums, int64_t count, double energy,
                                            const sebp_matrix *out, const sebp_matrix *in);

/** Frees sums. NULL: nothing. */
SEBP_API void sebp_basis_sums_destroy(sebp_basis_sums *sums);

/* ---- bases ---- */

/**
 * A pair of bases. Immutable, owns its memory, about 4 (r_out N + r_in K) bytes, belongs to no
 * context and may be shared between threads and by all layers of its kind.
 */
typedef struct sebp_basis sebp_basis;

/**
 * The leading eigenvectors of both sums. The sums stay as they were: one may add to them and solve
 * again. In each vector the element of largest magnitude (the first of them) is positive.
 *
 * Memory beside the result: LAPACK's workspace, which is 320 N bytes. Where all N vectors are asked
 * for it is 8 N^2 bytes, because in f32 only ssyevd's divide and conquer keeps them orthogonal.
 * Time: about N^3 + K^3 multiply-adds, and three times that where all vectors are asked for.
 *
 * @param rank_out  r_out, in [1, N]; N: all.
 * @param rank_in   r_in, in [1, K]; K: all.
 * @param basis     where it is put, untouched on error; free it with sebp_basis_destroy().
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_VALUE (a rank out of range; too few gradients
 *         for it, as t gradients span at most t min(N, K) directions of a side; all gradients zero,
 *         or so small that their squares are zero in f32); SEBP_ERROR_NONFINITE (the sums hold a
 *         NaN or Inf, which an addition that failed with SEBP_ERROR_BACKEND may have left, or
 *         LAPACK gives one); SEBP_ERROR_UNSUPPORTED (a build without LAPACK; the context's message
 *         says what to install); SEBP_ERROR_OVERFLOW (all vectors of more than 32766 are asked
 *         for); SEBP_ERROR_MEMORY; SEBP_ERROR_BACKEND (LAPACK failed).
 */
SEBP_API sebp_status sebp_basis_solve(sebp_context *context, sebp_basis_sums *sums,
                                      int64_t rank_out, int64_t rank_in, sebp_basis **basis);

/**
 * Makes a basis of given vectors, which are copied. Whether they are orthonormal is not checked.
 * Its shares are NaN.
 *
 * @param u_out  r_out x N, f32: row i is the i-th vector, column i of u_out as the paper has it.
 *               1 <= r_out <= N.
 * @param u_in   r_in x K, f32, likewise.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE (no rows); a status of
 *         sebp_matrix_check(); SEBP_ERROR_DTYPE (not f32); SEBP_ERROR_SHAPE (more rows than
 *         columns); SEBP_ERROR_NONFINITE; SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_basis_from_vectors(const sebp_matrix *u_out, const sebp_matrix *u_in,
                                             sebp_basis **basis);

/** Frees a basis. NULL: nothing. */
SEBP_API void sebp_basis_destroy(sebp_basis *basis);

/** u_out transposed, r_out x N: row i is the i-th vector. A view to read from, valid for as long as
 * the basis lives. For NULL an empty view. */
SEBP_API sebp_matrix sebp_basis_out(const sebp_basis *basis);

/** u_in transposed, r_in x K. As sebp_basis_out(). */
SEBP_API sebp_matrix sebp_basis_in(const sebp_basis *basis);

/** The share of sum ||G_t||^2 that lies in the vectors of u_out, in [0, 1] up to rounding; NaN if
 * it is not known. */
SEBP_API double sebp_basis_share_out(const sebp_basis *basis);

/** The same for u_in. */
SEBP_API double sebp_basis_share_in(const sebp_basis *basis);

/* ---- files ---- */

/**
 * Writes a basis to a file. The library first writes a new file beside the path, named
 * "<path>.new-" and numbers that no other file has (up to 17 more bytes). When that file is whole
 * and on the disk it is moved to the path. So on error the path keeps what it held, and a reader
 * sees either the old file or the new one. If several processes save to one path, the file of the
 * last one to finish stays. On error the new file is removed; a process that is killed leaves it
 * behind. The mode of the file is that of any new file, 0666 without the umask. A symbolic link is
 * replaced. A path that holds something else than a regular file (a device, a pipe, a socket, a
 * folder) is refused.
 *
 * The file, in the byte order and the IEEE floating point of the machine that writes it:
 *
 *     offset  bytes
 *          0      8  "SEBP" "BAS" and a byte 0x1A
 *          8      4  the number 0x01020304, which tells the byte order
 *         12      4  version of the format: 1
 *         16     32  N, K, r_out, r_in, 8 bytes each
 *         48     16  share_out, share_in: two f64
 *         64         u_out, r_out x N, then u_in, r_in x K: f32, row by row
 *       last      4  CRC-32 (that of zlib) of all bytes before
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_FILE (it cannot be written, or the path holds
 *         something else than a regular file; the context's message says why); SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_basis_save(sebp_context *context, const sebp_basis *basis,
                                     const char *path);

/**
 * Reads a basis from a regular file or a symbolic link to one. A device, a socket, a folder and a
 * pipe are refused. A pipe is not waited for.
 *
 * @param basis  where it is put, untouched on error.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_FILE (it cannot be read, is no basis, has
 *         another version, byte order or length than it should, or its checksum does not match; the
 *         context's message says which); SEBP_ERROR_NONFINITE (the file is intact, but holds a NaN
 *         or Inf); SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_basis_load(sebp_context *context, const char *path, sebp_basis **basis);

SEBP_END_DECLS

#endif
