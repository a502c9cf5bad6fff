dnl SPDX-License-Identifier: Apache-2.0

# SEBP_EXACT
# ----------
# FP_CFLAGS, with which the compiler computes what is written: no product and sum in one operation,
# no other order, no assuming that there is no NaN. It is an error where it does not, as make has
# the builder's flags after these. Looked for by what the compiler makes of a program, as there are
# many flags for it, and not each has a macro. After SEBP_ISA_TIERS.
AC_DEFUN([SEBP_EXACT],
[SEBP_COMPILER_FLAG([-ffp-contract=off], [FP_CFLAGS])
AS_IF([test "$sebp_cv_flag__ffp_contract_off" != yes],
  [AC_MSG_ERROR([$CC does not take -ffp-contract=off.
  Without it a compiler may round a product and a sum once instead of twice, and results would differ
  from processor to processor. gcc and clang take it.])])
sebp_saved_cflags=$CFLAGS
CFLAGS="$FP_CFLAGS $CFLAGS"
AC_MSG_CHECKING([whether $CC computes what is written])
sebp_inexact=
_SEBP_IF_FLUSHED([sebp_inexact="links what flushes denormals to zero in the whole process"])
_SEBP_IF_FUSED([sebp_inexact="rounds a product and a sum once"])
_SEBP_IF_FAST_MATH([sebp_inexact="assumes that there is no NaN, or sums in another order"])
CFLAGS=$sebp_saved_cflags
AS_IF([test -n "$sebp_inexact"],
  [AC_MSG_RESULT([no, it $sebp_inexact])
  AC_MSG_ERROR([with CFLAGS="$CFLAGS" LDFLAGS="$LDFLAGS" $CC $sebp_inexact.
  Leave out -ffast-math, -Ofast, -funsafe-math-optimizations, -ffinite-math-only, -ffp-contract=fast
  and the like: results must not depend on what a compiler makes of them.])],
  [AC_MSG_RESULT([yes])])])

# _SEBP_IF_FAST_MATH(ACTION)
# --------------------------
# The sources' own refusal, and for flags without a macro (clang's -fassociative-math) whether
# (x + 1) - x is taken to be 1: the call that does not link is then there.
AC_DEFUN([_SEBP_IF_FAST_MATH],
[sebp_saved_cppflags=$CPPFLAGS
CPPFLAGS="-I$srcdir/simd $CPPFLAGS"
AC_LINK_IFELSE([AC_LANG_PROGRAM([[
    #include "exact.h"
    void sebp_not_exact(void);]], [[
    volatile float number = 2;
    float x = number, sum = (x + 1) - x;
    if (__builtin_constant_p(sum)) sebp_not_exact()]])], [], [$1])
CPPFLAGS=$sebp_saved_cppflags])

# _SEBP_IF_FUSED(ACTION)
# ----------------------
# Looks for the instruction, or clang's word for it where CFLAGS ask for link time optimization.
AC_DEFUN([_SEBP_IF_FUSED],
[AC_LANG_CONFTEST([AC_LANG_SOURCE([[
    float sebp_f(float a, float b, float c) { return a * b + c; }
    double sebp_d(double a, double b, double c) { return a * b - c; }]])])
sebp_flags="$CFLAGS $CPPFLAGS -g0 -fno-lto"
AS_IF([test "$sebp_have_avx2" = yes], [sebp_flags="$AVX2_CFLAGS $sebp_flags"])
AS_IF([(set -x; $CC -S $sebp_flags -o conftest.s conftest.$ac_ext) >&AS_MESSAGE_LOG_FD 2>&1],
  [AS_IF([grep -i -E ['^[[:space:]]*([a-z]*fn?m(a|s|la|ls)|xsn?m(add|sub)|m[as][de]br|.*fmuladd)'] \
      conftest.s >&AS_MESSAGE_LOG_FD],
    [$1])],
  [AC_MSG_ERROR([$CC makes no assembly with $sebp_flags; see config.log])])
rm -f conftest.s conftest.$ac_ext])

# _SEBP_IF_FLUSHED(ACTION)
# ------------------------
# gcc links crtfastmath.o for -ffast-math and the like in CFLAGS or LDFLAGS, whatever follows them.
AC_DEFUN([_SEBP_IF_FLUSHED],
[AC_LANG_CONFTEST([AC_LANG_PROGRAM()])
AS_IF([$CC -o conftest$ac_exeext $CFLAGS $CPPFLAGS $LDFLAGS conftest.$ac_ext $LIBS '-###' 2>&1 |
    grep crtfastmath >&AS_MESSAGE_LOG_FD],
  [$1])
rm -f conftest.$ac_ext])
