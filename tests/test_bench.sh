#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# sebp-bench and sebp-info: results verified, output well formed, bad input refused. No timing is an
# error here.

set -u

bench=${top_builddir:-.}/bench/sebp-bench
info=${top_builddir:-.}/bench/sebp-info
shapes=${top_srcdir:-${srcdir:-.}}/bench/shapes.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0

pass() { passed=$((passed + 1)); }

fail() {
    failed=$((failed + 1))
    echo "FAILED: $1"
    cat "$work/out" "$work/err"
}

# run STATUS COMMAND...: its output goes to out and err; false on another exit status
run() {
    wanted=$1
    shift
    "$@" >"$work/out" 2>"$work/err"
    status=$?
    [ "$status" -eq "$wanted" ]
}

# succeeds COMMAND...
succeeds() {
    if run 0 "$@"; then pass; else fail "exit $status: $*"; fi
}

# refuses MESSAGE COMMAND...: exit 2, nothing on standard output, one line with MESSAGE
refuses() {
    message=$1
    shift
    if run 2 "$@" && [ ! -s "$work/out" ] && [ "$(wc -l <"$work/err")" -eq 1 ] &&
        grep -qF -e "$message" "$work/err"; then
        pass
    else
        fail "exit $status, expected 2 and '$message': $*"
    fi
}

# prints PATTERN: the last output has a line like it
prints() {
    if grep -qE -e "$1" "$work/out"; then pass; else fail "no line like '$1'"; fi
}

# csv CASES: one line a case, as many columns in each, and numbers that agree with each other
csv() {
    if awk -F, -v cases="$1" '
        function near(a, b) { return a - b <= 0.01 * b + 0.002 && b - a <= 0.01 * b + 0.002 }
        NR == 1 { columns = NF; for (i = 1; i <= NF; i++) at[$i] = i; next }
        NF != columns { print "line " NR ": " NF " columns"; bad = 1; next }
        $at["status"] == "ok" {
            dense = $at["dense_ms"]; ms = $at["compact_ms"]; limit = $at["limit_ms"]
            share = $at["active_rows"] / $at["M"]
            if (!(dense > 0 && ms > 0 && limit > 0 && $at["fill_gbs"] > 0 && $at["gflops"] > 0))
                { print "line " NR ": not positive"; bad = 1 }
            if ($at["rows"] == "found" && !($at["read_gbs"] > 0))
                { print "line " NR ": no read bandwidth"; bad = 1 }
            if (!near($at["speedup"], dense / ms) || !near($at["efficiency"], limit / ms))
                { print "line " NR ": ratios"; bad = 1 }
            if (limit < 0.99 * share * dense - 0.002 || share > $at["activity"] + 1 / $at["M"])
                { print "line " NR ": limit"; bad = 1 }
            if ($at["dense_min_ms"] > dense || $at["compact_min_ms"] > ms)
                { print "line " NR ": minimum over median"; bad = 1 }
        }
        END { if (NR != cases + 1) { print NR - 1 " cases, expected " cases; bad = 1 } exit bad }
        ' "$work/out"; then pass; else fail "malformed csv"; fi
}

# Results, in every dtype and direction, on one thread and on more than there may be cores.
for dtype in f32 bf16; do
    for threads in 1 3; do
        succeeds "$bench" --verify-only --quick --dtype $dtype --threads $threads
        prints verified
        succeeds "$bench" --verify-only --quick --dtype $dtype --threads $threads --forward
        prints verified
    done
    succeeds "$bench" --verify-only --quick --dtype $dtype --gemm native --seed 7
    for precision in split high medium; do
        succeeds "$bench" --verify-only --quick --dtype $dtype --precision $precision
    done
done
succeeds "$bench" --verify-only --shape 1x1:1 --shape 7x5:3 --shape 65x17:33 --pattern both
prints 'M 65, K 17, N 33'

# Tables
succeeds "$bench" --quick --repetitions 3 --seconds 0
prints '^dense .* Gflop/s'
prints '^tail +given +0.25 +128 '
succeeds "$bench" --csv --quick --repetitions 3 --seconds 0 --warm --cold --dtype both
csv 48
succeeds "$bench" --csv --quick --repetitions 2 --seconds 0 --forward
csv 6
succeeds "$bench" --csv --quick --verify-only --activity .5
csv 4
prints ',verified$'


# Packed weights: each case twice
succeeds "$bench" --quick --packed --repetitions 2 --seconds 0 --dtype both
prints '^tail +given +plain +0.25 +128 '
prints '^tail +given +packed +0.25 +128 '
succeeds "$bench" --csv --quick --packed --repetitions 2 --seconds 0 --forward --warm --cold
csv 24
if [ "$(grep -c ',auto,packed,' "$work/out")" -eq 12 ]; then pass; else fail "packed weights"; fi
succeeds "$bench" --verify-only --packed --precision medium --shape 65x17:33
prints '^verified$'
refuses '--packed goes' "$bench" --packed --choices
refuses '--packed goes' "$bench" --packed --method full
refuses '--packed goes' "$bench" --packed --attention
refuses '--packed goes' "$bench" --packed --layer

# Attention
for dtype in f32 bf16; do
    succeeds "$bench" --attention --quick --verify-only --dtype $dtype --threads 3
    prints '^ +256 +128 +128 +yes +'$dtype' verified$'
done
succeeds "$bench" --attention --verify-only --sequence 301
prints '^ +2107 +301 +64 +no +f32 verified$'
succeeds "$bench" --attention --quick --csv --repetitions 2 --seconds 0
if [ "$(grep -c ',ok$' "$work/out")" -eq 20 ] &&
    awk -F, 'NR > 1 && !($10 > 0 && $11 > 0 && $12 > 0 && $14 > 0) { bad = 1 }
        NF != 15 { bad = 1 } END { exit bad }' "$work/out"; then pass; else fail 'malformed csv'; fi
refuses '--attention goes' "$bench" --attention --forward
refuses '--attention goes' "$bench" --attention --shape 1x2:3
# Row-wise layers
succeeds "$bench" --layer --quick --verify-only --dtype both --threads 3
prints '^verified$'
succeeds "$bench" --choices --quick --repetitions 1 --seconds 0 --dtype both
prints 'of 30 cases'
succeeds "$bench" --choices --quick --repetitions 1 --seconds 0 --csv
prints 'auto_over_best'
succeeds "$bench" --layer --quick --csv --repetitions 2 --seconds 0
if awk -F, 'NF != 10 || (NR > 1 && !($8 > 0 && $9 > 0 && $10 > 0)) { exit 1 } END { exit NR != 23 }' \
    "$work/out"; then pass; else fail "malformed csv"; fi

# Training methods
methods=full,lora,mask,meprop,sparsegrad
succeeds "$bench" --quick --method $methods --verify-only --dtype both
prints '^verified$'
succeeds "$bench" --method $methods --verify-only --shape 9x5:3 --shape 65x17:33 --threads 3
succeeds "$bench" --quick --method sparsegrad,full --repetitions 2 --seconds 0 --basis-rank 40
prints '^full .* 100\.00%'
prints '^sparsegrad '
prints '^ +[a-z-]+ +[0-9.]+ Gflop +[0-9.]+ ms'

# methods_csv CASES: one line a method, whose phases add up, and for each order of SparseGrad's
# products; one order is chosen for each of its lines
methods_csv() {
    if awk -F, -v cases="$1" '
        NR == 1 { columns = NF; for (i = 1; i <= NF; i++) at[$i] = i; next }
        NF != columns { print "line " NR ": " NF " columns"; bad = 1; next }
        $at["order"] != "" {
            chosen += $at["status"] == "chosen"
            if (!($at["gradient_ms"] > 0 && $at["model_gflop"] > 0))
                { print "line " NR ": an order"; bad = 1 }
            next
        }
        {
            lines++
            sparsegrad += $at["method"] == "sparsegrad"
            if (!($at["total_ms"] > 0 && $at["step_ms"] > 0 && $at["gradient_bytes"] > 0))
                { print "line " NR ": not positive"; bad = 1 }
            elements = $at["N"] * $at["K"]; bytes = $at["gradient_bytes"] + $at["state_bytes"]
            if ($at["method"] == "full" && bytes != 12 * elements)
                { print "line " NR ": bytes of the full method"; bad = 1 }
            if ($at["method"] == "lora" &&
                bytes != 12 * $at["lora_rank"] * ($at["N"] + $at["K"]))
                { print "line " NR ": bytes of LoRA"; bad = 1 }
            if ($at["method"] == "mask" && !(bytes < 20 * $at["kept"] + 200))
                { print "line " NR ": bytes of a mask"; bad = 1 }
            if ($at["method"] == "sparsegrad" && fixed && !(bytes < 20 * $at["kept"] + 200))
                { print "line " NR ": bytes of a fixed support"; bad = 1 }
        }
        END {
            if (lines != cases || chosen != sparsegrad)
                { print lines " methods, " chosen " orders chosen"; bad = 1 }
            exit bad
        }' fixed="${2:-0}" "$work/out"; then pass; else fail "malformed csv"; fi
}
succeeds "$bench" --csv --quick --method $methods --repetitions 2 --seconds 0 --dtype both
methods_csv 10
succeeds "$bench" --csv --quick --method sparsegrad --repetitions 2 --seconds 0 --activity 1,.1 \
    --fixed-support --kept .05
methods_csv 2 1
succeeds "$bench" --csv --method full,lora --shape 1000000000x1000000000:1000000000 --activity 1
prints ',skipped: '
refuses '--method: ' "$bench" --quick --method full,mezo
refuses '--method: ' "$bench" --quick --method full,
refuses '--method: ' "$bench" --quick --method ''
refuses '--method goes' "$bench" --quick --method full --forward
refuses '--method goes' "$bench" --quick --method full --rows given
refuses '--method goes' "$bench" --quick --method full --cold
refuses '--kept' "$bench" --quick --kept .1
refuses '--kept: ' "$bench" --quick --method full --kept 0
refuses '--kept: ' "$bench" --quick --method full --kept 1.5
refuses '--basis-rank: ' "$bench" --quick --method sparsegrad --basis-rank 0
succeeds "$bench" --quick --method sparsegrad --basis-rank 5
prints '^skipped: 5 x 5 vectors'

# On a GPU: the emulated one.
emulated=${top_builddir:-.}/tests/emulated_bench
if [ -x "$emulated" ]; then
    succeeds "$emulated" --device cuda --verify-only --shape 65x17:33 --shape 40x16:24 \
        --pattern both --rows both --dtype both --activity 1,.3
    prints '^verified$'
    succeeds "$emulated" --device cuda --verify-only --shape 9x17:33 --forward --dtype both
    for precision in high medium; do
        succeeds "$emulated" --device cuda --verify-only --shape 40x64:32 --activity 1,.5 \
            --precision $precision
    done
    succeeds "$emulated" --device cuda --shape 12x8:8 --activity .5 --rows both --repetitions 2 \
        --seconds 0
    prints '^sebp-bench .*: emulated GPU, CUDA 13.0, '
    prints '^tail +given +0.5 +6 '
    prints '^tail +found +0.5 +6 '
    succeeds "$emulated" --device cuda --csv --shape 12x8:8 --activity .5 --rows given \
        --repetitions 1 --seconds 0 --gemm native
    prints ',1,cuda,native,plain,1,.*,ok$'
    refuses 'this build has no CUDA' "$bench" --quick --device cuda
else
    skipped=$((skipped + 1))
    echo "skipped: --device cuda: this build has no emulated GPU"
fi
refuses '--device: ' "$bench" --quick --device tpu
for option in --packed --attention --layer --choices --cold --warm '--method full' '--threads 2'; do
    # Options are meant to be split.
    # shellcheck disable=SC2086
    refuses '--device cuda goes' "$bench" --quick --device cuda $option
done

# More than any memory: skipped, with the reason.
succeeds "$bench" --csv --shape 1000000000x1000000000:1000000000 --activity 1,.5 --rows given
csv 2
prints ',skipped: '

# Shapes from files
printf '# two\n\nsmall 12 3 5 4 # four a sequence\nflat\t6 7 8\n' >"$work/shapes"
succeeds "$bench" --verify-only --shapes "$work/shapes"
prints '^small: M 12, K 3, N 5'
prints '^flat: M 6, K 7, N 8'
printf '\357\273\277small 12 3 5\n' >"$work/shapes" # after a byte order mark
succeeds "$bench" --verify-only --shapes "$work/shapes"
prints '^small: M 12, K 3, N 5'
bad_line() {
    printf 'good 12 3 5\n%b\n' "$1" >"$work/shapes"
    refuses "sebp-bench: $work/shapes:2: " "$bench" --shapes "$work/shapes"
}
bad_line 'short 12 3'
bad_line 'zero 0 3 5'
bad_line 'minus 12 -3 5'
bad_line 'letters 12 3 x5'
bad_line 'tail 12 3 5z'
bad_line 'huge 12 3 99999999999999999999'
bad_line 'many 12 3 5 4 1'
bad_line 'uneven 12 3 5 7'
bad_line 'a,b 12 3 5'
bad_line "long$(printf '%0600d' 0) 1 2 3"
: >"$work/empty"
refuses 'holds no shapes' "$bench" --shapes "$work/empty"
refuses "$work/none: " "$bench" --shapes "$work/none"
refuses "$work: " "$bench" --shapes "$work"

# The shapes that are installed, without their work
if [ "$(grep -c '^[^#]' "$shapes")" -eq 10 ]; then pass; else fail "shapes.txt has changed"; fi
mlp=${shapes%/*}/mlp-shapes.txt
if [ "$(grep -c '^[^#]' "$mlp")" -eq 6 ]; then pass; else fail "mlp-shapes.txt has changed"; fi
refuses '--sequence' "$bench" --method full --shapes "$mlp" --sequence 1000
refuses '--sequence' "$bench" --shapes "$shapes" --sequence 1000

# Options
refuses '--nonsense' "$bench" --nonsense
refuses 'nonsense' "$bench" nonsense
refuses '--shape' "$bench" --shape
refuses '--csv=1' "$bench" --csv=1
for shape in 12 12x3 12x3:0 12x3:5x 0x3:5 x3:5 12:3x5 ''; do
    refuses '--shape: ' "$bench" --shape "$shape"
done
for list in '' 0 1.5 -1 nan '.5,' ,.5 .5,,1 a; do
    refuses '--activity: ' "$bench" --quick --activity "$list"
done
refuses '--pattern: ' "$bench" --quick --pattern head
refuses '--rows: ' "$bench" --quick --rows lost
refuses '--rows: ' "$bench" --quick --rows found --forward
refuses '--layer goes' "$bench" --quick --layer --forward
refuses '--choices goes' "$bench" --choices --sequence 64
refuses '--layer goes' "$bench" --quick --layer --sequence 64
refuses '--dtype: ' "$bench" --quick --dtype f64
refuses '--gemm: ' "$bench" --quick --gemm blas
refuses '--precision: ' "$bench" --quick --precision bf16
for threads in 0 -1 1025 2.5 two ''; do
    refuses '--threads: ' "$bench" --quick --threads "$threads"
done
refuses '--repetitions: ' "$bench" --quick --repetitions 0
refuses '--seconds: ' "$bench" --quick --seconds -1
refuses '--seed: ' "$bench" --quick --seed x
refuses 'SEBP_GEMM' env SEBP_GEMM=fast "$bench" --quick
succeeds "$bench" --help
prints '^Usage: sebp-bench'
succeeds "$bench" --version
prints '^sebp-bench [0-9]+\.[0-9]+\.[0-9]+$'
version=$(sed 's/.* //' "$work/out")

# A full disk
fill_disk() { "$bench" --help >/dev/full; }
if [ ! -c /dev/full ]; then
    skipped=1
    echo "skipped: there is no /dev/full"
elif run 1 fill_disk && grep -q 'cannot write' "$work/err"; then
    pass
else
    fail "/dev/full"
fi

# sebp-info
succeeds "$info"
prints "^libsebp +$version\$"
prints '^context +[0-9]+ threads?, placement '
isa=$(sed -n 's/^kernels *\([a-z0-9]*\);.*/\1/p' "$work/out")
succeeds "$info" --isa
prints "^$isa\$"
if [ "$(head -n 1 "$work/out")" = scalar ]; then pass; else fail "scalar is not the first tier"; fi
for tier in $("$info" --isa); do
    succeeds env SEBP_MAX_ISA="$tier" "$info"
    prints "^kernels +$tier;"
done
succeeds "$info" --version
prints "^sebp-info $version\$"
succeeds "$info" --help
refuses '--nonsense' "$info" --nonsense
refuses 'nonsense' "$info" nonsense
if run 1 env SEBP_NUM_THREADS=many "$info" && grep -q '^context  *refused: .*SEBP_NUM_THREADS' "$work/out"; then
    pass
else
    fail "SEBP_NUM_THREADS=many"
fi

# sebp-info --python, with packages that stand in for the real one
if run 1 env PYTHON="$work/none" "$info" --python && [ ! -s "$work/out" ] &&
    grep -qF "sebp-info: cannot run '$work/none'" "$work/err"; then
    pass
else
    fail "an interpreter that is not there"
fi
if ! command -v "${PYTHON:-python3}" >/dev/null; then
    skipped=$((skipped + 1))
    echo "skipped: sebp-info --python: there is no ${PYTHON:-python3}"
else
    mkdir "$work/sebp"
    echo 'raise ImportError("half of it is missing")' >"$work/sebp/__init__.py"
    if run 1 env PYTHONPATH="$work" PYTHONDONTWRITEBYTECODE=1 "$info" --python &&
        [ ! -s "$work/out" ] && [ "$(wc -l <"$work/err")" -eq 1 ] &&
        grep -q '^sebp-info: .*: half of it is missing; "pip install' "$work/err"; then
        pass
    else
        fail "a package that cannot be imported"
    fi
    : >"$work/sebp/__init__.py"
    printf 'def main():\n    print("here")\n    return 3\n' >"$work/sebp/__main__.py"
    if run 3 env PYTHONPATH="$work" PYTHONDONTWRITEBYTECODE=1 "$info" --python &&
        [ "$(cat "$work/out")" = here ]; then
        pass
    else
        fail "sebp-info --python: exit $status"
    fi
fi

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
