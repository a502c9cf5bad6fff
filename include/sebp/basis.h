/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file basis.h
 * The bases in which a layer's weight gradient is sparse, from gradients seen over some steps.
 *
 * SparseGrad (Chekalina, Rudenko, Mezentsev, Mikhalev, Panchenko, Oseledets, EMNLP 2024): of the
 * weight gradients G_t (N x K) of layers of one kind, the HOSVD takes
 *
 *     u_out (N x N)  the eigenvectors of  sum over t of G_t G_t^T     (N x N)
 *     u_in  (K x K)  the eigenvectors of  sum over t of G_t^T G_t     (K x K)
 *
 * in descending order of eigenvalues. Here both sums are added to as gradients come, and no G_t is
 * kept. Of each side all the eigenvectors are taken, or the leading r_out and r_in: the share of
 * sum ||G_t||^2 that lies in them, the sum of their eigenvalues over that of all, is told.
 *
 * Sums are held and solved in f32: they are sums of f32 products of gradients that are themselves
 * f32 sums; what double would add lies below the noise of the smallest eigenvalues, whose directions
 * hold nothing, and would double the memory. Sums of BERT-base's kinds take 40 MB each.
 *
 * The eigenproblem is LAPACK's (ssyevr and ssyevd, through LAPACKE), on the threads of its BLAS.
 * Where these are OpenMP's they are no more than the context's, and one where it has a parallel_for
 * or a fork has left threads behind (context.h); a BLAS with threads of its own is left alone, as is any by a build without
 * OpenMP. Vectors may round differently with another number.
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
 * The two sums over gradients of one shape. Belongs to no context; used by one thread at a time.
 * Each of their elements is a sum of up to max(N, K) products a gradient: of 2^30 such products, or
 * 2^63 where all are zero, they are full.
 */
typedef struct sebp_basis_sums sebp_basis_sums;

/**
 * Empty sums, of no gradient yet. Memory: 4 (N^2 + K^2) bytes.
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
 * Adds G G^T and G^T G: N K (N + K) flop and a little more, as one half of each sum is computed.
 *
 * @param gradient  G: N x K, either dtype, any stride.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; a status of sebp_matrix_check(); SEBP_ERROR_SHAPE;
 *         SEBP_ERROR_NONFINITE (G holds a NaN or Inf, or sum ||G_t||^2 would leave the range of
 *         f32); SEBP_ERROR_OVERFLOW (the sums are full); SEBP_ERROR_MEMORY; SEBP_ERROR_BACKEND. On all but the last the sums are as they
 *         were.
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
 * Puts sums copied out in the place of what these hold: what follows is the same, bit for bit. Of
 * both matrices the upper triangle counts; what is below the diagonal may be anything.
 *
 * What is damaged is refused where it can be told: on both diagonals no element is negative and
 * their sum is `energy`, and the square of no other element is more than the product of the two on
 * the diagonal in its row and its column, as far as the rounding of count * K and of count * N
 * products allows.
 *
 * @param count   gradients in them, >= 0.
 * @param energy  as exported: finite, >= 0; 0 where count is.
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
 * The leading eigenvectors of both sums. The sums are left as they were, and may be added to and
 * solved again. Of each vector the element of largest magnitude (the first of them) is positive.
 *
 * Memory beside the result: LAPACK's workspace, 320 bytes for each of N; where all N vectors are
 * wanted 8 N^2 bytes, as f32 needs the divide and conquer of ssyevd to keep them orthogonal.
 * Time: about N^3 + K^3 multiply-adds, three times that where all are wanted.
 *
 * @param rank_out  r_out, in [1, N]; N: all.
 * @param rank_in   r_in, in [1, K]; K: all.
 * @param basis     where it is put, untouched on error; free it with sebp_basis_destroy().
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_VALUE (a rank out of range; or too few
 *         gradients for it: t of them span t min(N, K) directions of a side at most; or none but
 *         zeros, or so small that their squares are zero in f32); SEBP_ERROR_NONFINITE (the sums
 *         hold a NaN or Inf, as SEBP_ERROR_BACKEND of an addition may leave them, or LAPACK gives
 *         one); SEBP_ERROR_UNSUPPORTED (a build without LAPACK; the context's message says what to
 *         install);
 *         SEBP_ERROR_OVERFLOW (all vectors, of more than 32766); SEBP_ERROR_MEMORY;
 *         SEBP_ERROR_BACKEND (LAPACK failed).
 */
SEBP_API sebp_status sebp_basis_solve(sebp_context *context, sebp_basis_sums *sums,
                                      int64_t rank_out, int64_t rank_in, sebp_basis **basis);

/**
 * Bases from vectors at hand, copied; that they are orthonormal is not checked. Their shares are
 * NaN.
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

/** u_out transposed, r_out x N: row i is the i-th vector. Read only, for as long as the basis
 * lives. For NULL an empty view. */
SEBP_API sebp_matrix sebp_basis_out(const sebp_basis *basis);

/** u_in transposed, r_in x K. As sebp_basis_out(). */
SEBP_API sebp_matrix sebp_basis_in(const sebp_basis *basis);

/** The share of sum ||G_t||^2 in the leading vectors of u_out, in [0, 1] up to rounding; NaN where
 * it is not known. */
SEBP_API double sebp_basis_share_out(const sebp_basis *basis);

/** As sebp_basis_share_out(), of u_in. */
SEBP_API double sebp_basis_share_in(const sebp_basis *basis);

/* ---- files ---- */

/**
 * Writes a basis to a file. It is written to a new file beside the path, "<path>.new-" and numbers
 * that no other file has (up to 17 bytes more), and moved there when it is whole and on the disk:
 * what the path held is not lost on error, a reader sees the one or the other, and of several
 * processes that save to one path the last to be done has it. On error the new file is removed; a
 * process that is killed leaves it. Its mode is that of any new file, 0666 without the umask; a
 * symbolic link is replaced. A path that holds anything else but a regular file, a device, a pipe, a
 * socket or a folder, is refused.
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
 *         what is no file; the context's message says why); SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_basis_save(sebp_context *context, const sebp_basis *basis,
                                     const char *path);

/**
 * Reads a basis from a file. What the path holds is a regular file or a link to one: a pipe is
 * refused and not waited for, and so are a device, a socket and a folder.
 *
 * @param basis  where it is put, untouched on error.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_FILE (it cannot be read, is no basis, is of
 *         another version or byte order, has another length than its sizes say, or its checksum
 *         does not match; the context's message says which); SEBP_ERROR_NONFINITE (it holds a NaN
 *         or Inf all the same); SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_basis_load(sebp_context *context, const char *path, sebp_basis **basis);

SEBP_END_DECLS

#endif
