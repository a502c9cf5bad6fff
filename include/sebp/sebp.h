/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sebp.h
 * libsebp: fine-tuning on CPUs and GPUs without computing rows that cannot matter.
 *
 * Conventions that hold in every header:
 *
 * - **Rows are tokens.** A linear layer is Y = X W^T + b with X: M x K, W: N x K, Y and its
 *   gradient dY: M x N, b: 1 x N. M = batch x sequence length, K = in_features, N = out_features.
 * - **A matrix is a view** (matrix.h). The library never owns, frees or resizes a caller's data.
 *   Sizes are int64_t, counted in elements; strides are in elements too.
 * - **Everything that can fail returns a sebp_status** (status.h). On any status but SEBP_SUCCESS
 *   the outputs are as they were: arguments are checked and scratch memory is reserved before the
 *   first write. SEBP_ERROR_BACKEND alone may leave them half written.
 * - **Order of checks**: NULL; the size_bytes of options; each view by itself (size, dtype, stride,
 *   overflow); values of options; the row set against M; shapes against each other; aliasing; last,
 *   indices, labels and positions. The status of the first check that fails is returned.
 * - **On a device with a memory of its own** (context.h) every function may also return
 *   SEBP_ERROR_MEMORY and SEBP_ERROR_BACKEND. Matrices, kept elements, indices, labels and positions
 *   lie in its memory; one that does not is SEBP_ERROR_VALUE. A function that must look at indices,
 *   labels or positions waits for a copy. One that keeps state (basis.h's sums, the moments of kept
 *   elements) has it in the host's memory, and returns SEBP_ERROR_UNSUPPORTED there.
 * - **Structs that begin with size_bytes can grow.** A program sets the size that its own header
 *   has. Sizes from that of version 0.1.0 up to 4096 are accepted, any other is SEBP_ERROR_SIZE. A
 *   shorter struct of options has defaults for the fields it lacks. A longer one is refused, with
 *   SEBP_ERROR_SIZE, only if the bytes that this version does not know are not all zero. sebp_info
 *   is filled up to the size that the caller has set; what this version does not know is set to
 *   zero.
 * - **NULL** is an error except where a function says what it means.
 * - **NaN and Inf**: a row that holds one is active and never dropped. An inactive row of X is not
 *   read, so a NaN or Inf in it does not spread: dense code turns 0 * Inf into NaN, this library
 *   does not. Wherever X and W are finite the results equal the dense ones up to the order of
 *   summation.
 * - **Threads**: a context is used by one thread at a time; contexts are independent of each other.
 *   Row sets and views are read-only once made and may be shared between threads.
 * - **Precision**: products of f32 are as exact as the context says (context.h, sebp_precision).
 * - **Repeatability**: the same call on the same context gives the same bits. The library's own
 *   GEMM gives the same bits for every number of threads; oneDNN need not.
 * - The library prints nothing, except for the lines on standard error that SEBP_VERBOSE asks for.
 *   It never aborts, and it reads the environment only while a context is made. context.h says what
 *   the libraries that it uses do when memory runs out.
 */
#ifndef SEBP_SEBP_H
#define SEBP_SEBP_H

#include <sebp/activation.h>
#include <sebp/attention.h>
#include <sebp/basis.h>
#include <sebp/clip.h>
#include <sebp/context.h>
#include <sebp/device.h>
#include <sebp/embedding.h>
#include <sebp/info.h>
#include <sebp/layers.h>
#include <sebp/linear.h>
#include <sebp/lora.h>
#include <sebp/loss.h>
#include <sebp/matrix.h>
#include <sebp/meprop.h>
#include <sebp/optim.h>
#include <sebp/packed_weight.h>
#include <sebp/random.h>
#include <sebp/rows.h>
#include <sebp/sampled.h>
#include <sebp/sequences.h>
#include <sebp/sparse.h>
#include <sebp/sparsegrad.h>
#include <sebp/status.h>
#include <sebp/version.h>

#endif
