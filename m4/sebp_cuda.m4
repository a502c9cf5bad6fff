dnl SPDX-License-Identifier: Apache-2.0

# SEBP_CUDA
# ---------
# The backend for NVIDIA GPUs, which is built where it is asked for. Else the same sources are compiled
# for a GPU that is emulated (tests/cuda), so that make check tests them; that needs a compiler of C++20.
#
# CUDA_CPPFLAGS, CUDA_LIBS, CUBLAS_LIBS; CUDA_COMPILE, which compiles a .cu file; SEBP_HAVE_CUDA and
# SEBP_HAVE_CUBLAS for C; conditionals CUDA, CUBLAS and CUDA_EMULATED; sebp_cuda_summary.
AC_DEFUN([SEBP_CUDA],
[AC_ARG_WITH([cuda],
  [AS_HELP_STRING([--with-cuda@<:@=DIR@:>@],
    [the backend for NVIDIA GPUs, by the CUDA toolkit in DIR or that of nvcc @<:@default: no@:>@])],
  [], [with_cuda=no])
AC_ARG_WITH([cuda-arch],
  [AS_HELP_STRING([--with-cuda-arch=LIST],
    [compute capabilities to compile for, "80 90"; PTX of the last one is added])],
  [], [with_cuda_arch="80 90"])
AC_ARG_VAR([NVCC], [the CUDA compiler])
AC_ARG_VAR([NVCCFLAGS], [options for it, as -lineinfo for profilers and sanitizers])
sebp_have_cuda=no
sebp_have_cublas=no
sebp_have_emulated_cuda=no
AS_CASE([$with_cuda],
  [no], [_SEBP_CUDA_EMULATED],
  [yes|/*], [_SEBP_CUDA_TOOLKIT],
  [AC_MSG_ERROR([--with-cuda=$with_cuda is neither yes nor no nor a full path])])
AC_SUBST([CUDA_CPPFLAGS])
AC_SUBST([CUDA_COMPILE])
AC_SUBST([CUDA_HOPPER])
AC_SUBST([CUDA_LIBS])
AC_SUBST([CUBLAS_LIBS])
AC_SUBST([CUDA_PRIVATE_LIBS])
AM_CONDITIONAL([CUDA], [test "$sebp_have_cuda" = yes])
AM_CONDITIONAL([CUBLAS], [test "$sebp_have_cublas" = yes || test "$sebp_have_emulated_cuda" = yes])
AM_CONDITIONAL([CUDA_EMULATED], [test "$sebp_have_emulated_cuda" = yes])])

# Warnings of the host's compiler that are errors for C are so for kernels on the emulated GPU. Kernels
# read several elements at once as words of other types, as CUDA C++ is read by nvcc.
AC_DEFUN([_SEBP_CUDA_EMULATED],
[AC_LANG_PUSH([C++])
AC_CACHE_CHECK([for $CXX option to compile C++20], [sebp_cv_cxx20],
  [sebp_cv_cxx20=no
  sebp_saved_cxxflags=$CXXFLAGS
  for sebp_flag in -std=c++20 -std=c++2a; do
    CXXFLAGS="$sebp_saved_cxxflags $sebp_flag"
    AC_COMPILE_IFELSE([AC_LANG_PROGRAM([[
        #include <functional>
        #include <type_traits>
        template <class T> T f(std::type_identity_t<T> x) { return x; }]],
        [[struct { int a, b; } made = {.a = f<int>(1), .b = 2};
          return made.a + made.b - 3;]])],
      [sebp_cv_cxx20=$sebp_flag
      break])
  done
  CXXFLAGS=$sebp_saved_cxxflags])
AC_LANG_POP([C++])
# Where there is no cross compiler for C++, autoconf takes the native one.
sebp_cc_machine=`$CC -dumpmachine 2>/dev/null | sed 's/-.*//'`
sebp_cxx_machine=`$CXX -dumpmachine 2>/dev/null | sed 's/-.*//'`
AS_IF([test "$sebp_cc_machine" != "$sebp_cxx_machine"], [sebp_cv_cxx20=no])
AS_IF([test "$sebp_cv_cxx20" = no],
  [sebp_cuda_summary="no (--with-cuda); its kernels are not tested, as no compiler of C++20 was found"],
  [sebp_have_emulated_cuda=yes
  sebp_cuda_summary="no (--with-cuda)"
  CUDA_CPPFLAGS='-I$(top_srcdir)/tests/cuda -DSEBP_HAVE_CUBLAS'
  CUDA_COMPILE="\$(CXX) $sebp_cv_cxx20 -x c++ -O2 -g -fno-strict-aliasing -Wall -Wextra -Wno-unknown-pragmas \$(DEFAULT_INCLUDES) \$(AM_CPPFLAGS) \$(CUDA_CPPFLAGS) \$(SANITIZE_CFLAGS) \$(VISIBILITY_CFLAGS)"
  AS_IF([test "$enable_werror" = yes], [CUDA_COMPILE="$CUDA_COMPILE -Werror"])
  CUDA_LIBS=-lstdc++])])

# The toolkit says itself where it lies.
AC_DEFUN([_SEBP_CUDA_TOOLKIT],
[AS_IF([test "$with_cuda" = yes],
  [AC_PATH_PROG([NVCC], [nvcc], [no], [$PATH$PATH_SEPARATOR/usr/local/cuda/bin])],
  [AC_PATH_PROG([NVCC], [nvcc], [no], [$with_cuda/bin])])
AS_IF([test "$NVCC" = no],
  [AC_MSG_ERROR([--with-cuda was given, but there is no nvcc; NVCC=... names one])])
AC_MSG_CHECKING([where the CUDA toolkit lies])
echo 'int main() { return 0; }' >conftest.cu
sebp_cuda_top=`$NVCC --dryrun -c conftest.cu -o conftest.o 2>&1 | sed -n 's/^#\$ TOP=//p'`
sebp_cuda_top=`cd "$sebp_cuda_top" 2>/dev/null && pwd -P`
AC_MSG_RESULT([$sebp_cuda_top])
CUDA_CPPFLAGS=
sebp_cuda_lib=
sebp_cublas=no
for sebp_folder in "$sebp_cuda_top" "$sebp_cuda_top/targets/x86_64-linux" "$sebp_cuda_top/targets/sbsa-linux"; do
  AS_IF([test -e "$sebp_folder/include/cuda_runtime_api.h"], [CUDA_CPPFLAGS="-I$sebp_folder/include"])
  for sebp_name in lib64 lib; do
    AS_IF([test -e "$sebp_folder/$sebp_name/libcudart_static.a"],
      [sebp_cuda_lib=$sebp_folder/$sebp_name])
  done
done
AS_IF([test -z "$CUDA_CPPFLAGS" || test -z "$sebp_cuda_lib"],
  [AC_MSG_ERROR([--with-cuda: $sebp_cuda_top has no cuda_runtime_api.h or no libcudart_static.a])])
CUDA_HOPPER='-gencode arch=compute_90a,code=sm_90a'
sebp_cuda_gencode=
sebp_last=
for sebp_arch in $with_cuda_arch; do
  sebp_cuda_gencode="$sebp_cuda_gencode -gencode arch=compute_$sebp_arch,code=sm_$sebp_arch"
  sebp_last=$sebp_arch
done
sebp_cuda_gencode="$sebp_cuda_gencode -gencode arch=compute_$sebp_last,code=compute_$sebp_last"
AC_MSG_CHECKING([whether $NVCC compiles for $with_cuda_arch])
AS_IF([$NVCC -std=c++20 $sebp_cuda_gencode -c conftest.cu -o conftest.o >&AS_MESSAGE_LOG_FD 2>&1],
  [AC_MSG_RESULT([yes])],
  [AC_MSG_RESULT([no])
  AC_MSG_ERROR([$NVCC cannot compile C++20 for the compute capabilities $with_cuda_arch; config.log says why])])
rm -f conftest.cu conftest.o
CUDA_COMPILE="\$(SHELL) \$(top_srcdir)/lib/cuda/nvcc.sh \$(NVCC) -std=c++20 -O3 -Xfatbin=-compress-all -fno-exceptions \$(DEFAULT_INCLUDES) \$(AM_CPPFLAGS) \$(NVCCFLAGS)"
CUDA_GENCODE=$sebp_cuda_gencode
AC_SUBST([CUDA_GENCODE])
CUDA_LIBS="-L$sebp_cuda_lib -lcudart_static -lrt -ldl -lstdc++"
AC_ARG_WITH([cublas],
  [AS_HELP_STRING([--with-cublas@<:@=DIR@:>@],
    [cuBLASLt for large products on GPUs, in the toolkit or in DIR @<:@default: if found@:>@])],
  [], [with_cublas=check])
AS_IF([test "$with_cublas" != no], [_SEBP_CUBLAS])
AS_IF([test "$with_cublas" != no && test "$with_cublas" != check && test $sebp_have_cublas = no],
  [AC_MSG_ERROR([--with-cublas was given, but cublasLt.h or libcublasLt was not found])])
sebp_have_cuda=yes
CUDA_PRIVATE_LIBS="$CUBLAS_LIBS $CUDA_LIBS" # of the library; the emulated GPU is of its tests alone
AC_DEFINE([SEBP_HAVE_CUDA], [1], [Define if the backend for NVIDIA GPUs is built.])
sebp_cuda_summary="yes, $sebp_cuda_top, for $with_cuda_arch, cuBLASLt: $sebp_have_cublas"])

# In the packages for Python the library has no name without its version.
AC_DEFUN([_SEBP_CUBLAS],
[AC_MSG_CHECKING([for cuBLASLt])
sebp_cublas=
CUBLAS_LIBS=
AS_CASE([$with_cublas], [/*], [sebp_places=$with_cublas],
  [sebp_places="$sebp_cuda_top $sebp_cuda_top/targets/x86_64-linux $sebp_cuda_top/targets/sbsa-linux"])
for sebp_folder in $sebp_places; do
  for sebp_name in lib64 lib; do
    for sebp_file in "$sebp_folder/$sebp_name"/libcublasLt.so*; do
      AS_IF([test -z "$sebp_cublas" && test -e "$sebp_file" &&
             test -e "$sebp_folder/include/cublasLt.h"],
        [sebp_cublas=$sebp_file
        sebp_cublas_include=$sebp_folder/include])
    done
  done
done
AS_IF([test -n "$sebp_cublas"],
  [sebp_have_cublas=yes
  CUDA_CPPFLAGS="$CUDA_CPPFLAGS -I$sebp_cublas_include"
  # It is found there when the library runs, too.
  # libtool moves this to the front, where a compiler that asks for --as-needed drops it.
  CUBLAS_LIBS="-Wl,--push-state,--no-as-needed,$sebp_cublas,--pop-state -Wl,-rpath,`dirname "$sebp_cublas"`"
  AC_DEFINE([SEBP_HAVE_CUBLAS], [1], [Define if large products on GPUs are cuBLASLt's.])])
AC_MSG_RESULT([${sebp_cublas:-no}])])
