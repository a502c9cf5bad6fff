dnl SPDX-License-Identifier: Apache-2.0

# SEBP_ISA_TIER(NAME, HOST-CPU, FLAGS, HEADER, EXPRESSION)
# --------------------------------------------------------
# The tier NAME of kernels is in the build if the host is HOST-CPU (a shell pattern) and the
# compiler takes FLAGS and knows the intrinsics in EXPRESSION. What the CPU of the building machine
# can run does not matter. Sets SEBP_HAVE_NAME for C, the conditional ISA_NAME, and NAME_CFLAGS.
AC_DEFUN([SEBP_ISA_TIER],
[m4_pushdef([sebp_upper], m4_toupper([$1]))dnl
sebp_have_$1=no
AS_CASE([$host_cpu], [$2],
  [AC_CACHE_CHECK([whether $CC compiles kernels for $1], [sebp_cv_isa_$1],
    [sebp_saved_cflags=$CFLAGS
    CFLAGS="$3 $CFLAGS"
    AC_COMPILE_IFELSE([AC_LANG_PROGRAM([[#include <$4>]], [[(void)($5)]])],
      [sebp_cv_isa_$1=yes], [sebp_cv_isa_$1=no])
    CFLAGS=$sebp_saved_cflags])
  sebp_have_$1=$sebp_cv_isa_$1])
AS_IF([test "$sebp_have_$1" = yes],
  [AC_DEFINE([SEBP_HAVE_]sebp_upper, [1], [Define if the build has kernels for $1.])
  AS_VAR_APPEND([sebp_isa_tiers], [" $1"])])
AM_CONDITIONAL([ISA_]sebp_upper, [test "$sebp_have_$1" = yes])
AC_SUBST(sebp_upper[_CFLAGS], ["$3"])
m4_popdef([sebp_upper])dnl
])

# SEBP_ISA_TIERS
# --------------
# Every tier but scalar, which is in each build. Names are those of SEBP_MAX_ISA.
AC_DEFUN([SEBP_ISA_TIERS],
[sebp_isa_tiers=scalar
SEBP_ISA_TIER([avx2], [x86_64], [-mavx2 -mfma],
  [immintrin.h], [_mm256_fmadd_ps(_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps())])
SEBP_ISA_TIER([avx512], [x86_64],
  [-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma],
  [immintrin.h], [_mm512_or_ps(_mm512_setzero_ps(), _mm512_setzero_ps())])
SEBP_ISA_TIER([avx512bf16], [x86_64],
  [-mavx512bf16 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma],
  [immintrin.h], [_mm512_cvtneps_pbh(_mm512_setzero_ps())])
SEBP_ISA_TIER([amx], [x86_64],
  [-mamx-tile -mamx-bf16 -mavx512bf16 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma],
  [immintrin.h], [({ _tile_dpbf16ps(0, 1, 2); _mm512_cvtneps_pbh(_mm512_setzero_ps()); })])
SEBP_ISA_TIER([neon], [aarch64|arm64], [],
  [arm_neon.h], [vfmaq_f32(vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0))])
AS_IF([test "$sebp_have_avx512" = yes],
  [SEBP_COMPILER_FLAG([-mprefer-vector-width=512], [WIDE_VECTOR_CFLAGS])])
AC_SUBST([WIDE_VECTOR_CFLAGS])
# In unrolled kernels gcc spends a third of its time on where -g finds each variable.
SEBP_COMPILER_FLAG([-fno-var-tracking], [KERNEL_DEBUG_CFLAGS])])
