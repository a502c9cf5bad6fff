/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sebp.h
 * libsebp: fine-tuning on CPUs without computing rows that cannot matter.
 *
 * Conventions, stated once for every header:
 *
 * - **Rows are tokens.** A linear layer is Y = X W^T + b with X: M x K, W: N x K, Y and its
 *   gradient dY: M x N, b: 1 x N. M = batch x sequence length, K = in_features, N = out_features.
 * - **A matrix is a view** (matrix.h). The library never owns, frees or resizes a caller's data.
 *   Sizes are int64_t, counted in elements; strides are in elements too.
 * - **Everything that can fail returns a sebp_status** (status.h). On any status but SEBP_SUCCESS
 *   the outputs are as they were: arguments are checked, and scratch memory is had, before the
 *   first write. SEBP_ERROR_BACKEND alone may leave them half written.
 * - **Order of checks**: NULL, then the size_bytes of options, then each view by itself (size,
 *   dtype, stride, overflow), then values of options, the row set against M, shapes against each
 *   other, and aliasing last. The first that fails is returned.
 * - **Structs that begin with size_bytes can grow.** A program sets the size that its own header
 *   has. Any from version 0.1.0's on is taken, up to 4096: what a shorter struct of options lacks is
 *   as by default, and a longer one is refused, with SEBP_ERROR_SIZE, only where what this version
 *   does not know is not all zeros. sebp_info is filled as far as the caller's goes, and the rest of
 *   a longer one with zeros.
 * - **NULL** is an error except where a function says what it means.
 * - **NaN and Inf**: a row that holds one is active and never dropped. What an inactive row of X
 *   holds is not read, so it cannot spread: where dense code turns 0 * Inf into NaN, this does not.
 *   The results equal the dense ones up to the order of summation wherever X and W are finite.
 * - **Threads**: a context is used by one thread at a time; contexts are independent of each other.
 *   Row sets and views are read-only once made and may be shared between threads.
 * - **Repeatability**: the same call on the same context gives the same bits. The library's own
 *   GEMM gives the same bits for every number of threads; oneDNN need not.
 * - The library prints nothing (but the lines asked for by SEBP_VERBOSE, on standard error), never
 *   aborts, and reads the environment only while a context is made. What the libraries underneath do
 *   without memory is another matter: context.h.
 */
#ifndef SEBP_SEBP_H
#define SEBP_SEBP_H

#include <sebp/attention.h>
#include <sebp/basis.h>
#include <sebp/clip.h>
#include <sebp/context.h>
#include <sebp/embedding.h>
#include <sebp/info.h>
#include <sebp/layers.h>
#include <sebp/linear.h>
#include <sebp/lora.h>
#include <sebp/loss.h>
#include <sebp/matrix.h>
#include <sebp/meprop.h>
#include <sebp/optim.h>
#include <sebp/random.h>
#include <sebp/rows.h>
#include <sebp/sequences.h>
#include <sebp/sparse.h>
#include <sebp/sparsegrad.h>
#include <sebp/status.h>
#include <sebp/version.h>

#endif
