/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file exact.h
 * Refuses compiler flags that change what the code computes.
 *
 * The kernels find NaN and Inf, tell -0 from 0, and sum in a fixed order, so that results have the
 * same bits for any number of threads. Compilers announce some of these flags by macros; configure
 * looks for the others.
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
