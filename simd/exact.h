/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file exact.h
 * Refuses compilers' flags that let them compute something else than what is written.
 *
 * The kernels find NaN and Inf, tell -0 from 0 by comparing, and sum in an order that makes the
 * results the same bits for any threads and rows. Compilers tell of these flags by macros; configure
 * looks for those of which they do not.
 */
#ifndef SEBP_EXACT_H
#define SEBP_EXACT_H

#if defined __FAST_MATH__
#error "libsebp cannot be compiled with -ffast-math or -Ofast"
#endif
#if defined __FINITE_MATH_ONLY__ && __FINITE_MATH_ONLY__ > 0
#error "libsebp cannot be compiled with -ffinite-math-only"
#endif
#if defined __ASSOCIATIVE_MATH__ || defined __RECIPROCAL_MATH__ || defined __NO_SIGNED_ZEROS__
#error "libsebp cannot be compiled with -funsafe-math-optimizations or parts of it"
#endif

#endif
