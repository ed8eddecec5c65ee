"""A gate on the tests: faults put into the kernels on purpose, each of which they must catch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, build_extension, file_of

from bertfast.ops.extension import C

# (name, file of csrc/cpu or with its folder, text that occurs once, its replacement, test file that
# must fail); the CUDA kernels run on the CPU
MUTANTS = [
    ("causal mask ignored", "attention_task.h", "if (g.causal) reach.after = 0;", "", "attention"),
    ("last key dropped", "attention_task.h", "args.starts_k[b + 1] - first_key),", "max(args.starts_k[b + 1] - first_key - 1, 0)),", "attention"),
    ("scale 2% off", "attention_task.h", "vf v = load(s + j) * g.scale;", "vf v = load(s + j) * (g.scale * 1.02f);", "attention"),
    ("additive bias ignored", "attention_task.h", "if (g.bias.data)", "if (false)", "attention"),
    ("heads swapped", "attention_task.h", "first_key * g.k_token + h * g.k_head", "first_key * g.k_token + (g.heads - 1 - h) * g.k_head", "attention"),
    ("first sequence for all", "attention_task.h", "first_key(args.starts_k[b])", "first_key(args.starts_k[0])", "attention"),
    ("no maximum subtracted", "attention_head.h", "from = peak == -kInf ? 0 : peak;", "from = 0;", "attention"),
    ("masked row not zero", "attention_head.h", "return z == 0 ? 0 : 1 / z;", "return 1 / z;", "attention"),
    ("log-sum-exp without its maximum", "attention", "shift + __builtin_logf(z)", "__builtin_logf(z)", "attention"),
    ("zero gradient of values", "attention_backward", "put(dv_, n_, g_.dv, t_.first_key, g_.dk_token, 1);", "put(dv_, n_, g_.dv, t_.first_key, g_.dk_token, 0);", "attention"),
    ("delta missing in backward", "attention_backward", "(load(ds + j) - mean)", "(load(ds + j))", "attention"),
    ("probabilities as the log-sum-exp's rounding has them", "attention_backward", "inverse = z == 0 ? 0 : 1 / z, mean", "inverse = z == 0 ? 0 : 1, mean", "attention"),
    ("key gradient unscaled", "attention_backward", "put(dk_, n_, g_.dk, t_.first_key, g_.dk_token, g_.scale);", "put(dk_, n_, g_.dk, t_.first_key, g_.dk_token, 1);", "attention"),
    ("later query blocks overwrite", "attention_backward", "dv_ + key * dim_row_, dim_row_, true", "dv_ + key * dim_row_, dim_row_, false", "attention"),
    ("dropout not in backward", "attention_backward", "kept = drop(prob, bits_ + j, g_.dropout);", "kept = prob;", "attention"),
    ("keys' strides for queries'", "attention_task.h", "start * g.q_token + h * g.q_head", "start * g.k_token + h * g.q_head", "cross_attention"),
    ("gradients of keys begin with what was there", "attention_backward", "std::memset(dk_, 0, 2 *", "std::memset(dk_, 0, 0 *", "cross_attention"),
    ("window to the right one short", "attention_task.h", "{g.window, g.window}", "{g.window, g.window - (g.window > 0)}", "attention_window"),
    ("keys before the window seen", "attention_head.h", "j < low; j += W", "j < 0; j += W", "attention_window"),
    ("dropout's bits of the first keys", "attention", "keys.end, bits, keys.first)", "keys.end, bits)", "attention_window"),
    ("margin of a block's scores not zero", "attention_backward", "zero(x - kMargin, x + skip);", "", "attention_window"),
    ("queries out of the window's reach forgotten", "attention_backward", "key + valid + t_.reach.before)", "key + 1 + t_.reach.before)", "attention_window"),
    ("distances mirrored", "attention_relative.h", "side == kQueries ? distance : -distance", "distance", "attention_relative"),
    ("keys' share of relative scores lost", "attention_relative.h", "tile(kKeys", "tile(kQueries", "attention_relative"),
    ("embeddings' gradients of the last block alone", "attention_relative_backward.h", "of(side) + c * dim_row_, dim_row_, true", "of(side) + c * dim_row_, dim_row_, false", "attention_relative"),
    ("embeddings' gradients unscaled", "attention_relative_backward.h", "load(from + j) * g.scale", "load(from + j)", "attention_relative"),
    ("a gradient through distances one off", "attention_relative_backward.h", "distances_.column(i, j) * NR", "distances_.column(i, j + (j > 0)) * NR", "attention_relative"),
    ("dropout unscaled", "philox.h", "v * d.scale : vf{}", "v : vf{}", "add_layer_norm"),
    ("dropout with probability off", "philox.h", "u >= d.threshold", "u >= d.threshold + 0x1000000", "dropout"),
    ("Philox with a round less", "philox.h", "round < 10", "round < 9", "dropout"),
    ("seed's offset ignored", "philox.h", "uint64_t(seed[1])", "0", "dropout"),
    ("tanh for erf", "vec.h", "if (activation == 1) return gelu(z);", "if (activation == 1) return activate<2>(z);", "linear_act"),
    ("derivative of the other GELU", "vec.h", "return gelu_derivative(z);", "return derivative<2>(z);", "linear_act"),
    ("ReLU passes its gradient", "vec.h", "if (activation == 3) return z > 0 ? splat(1) : vf{};", "if (activation == 3) return splat(1);", "linear_act"),
    ("bias of a product forgotten", "linear_act", "+ load(bias + j * W);", ";", "linear_act"),
    ("sum of a block of k lost", "linear_act", "out, !first,", "out, false,", "linear_act"),
    ("last row of a product lost", "linear_act", "int64_t valid = min(tile, rows - m);", "int64_t valid = min(tile, rows - m) - (rows - m > 1 && rows - m <= tile);", "linear_act"),
    ("few rows take one block of k", "linear_act", "pack_b<u>(g, bb, p0, fresh,", "pack_b<u>(g, b_block(0), p0, fresh,", "linear_act"),
    ("wrong part of the weights", "linear_act", "(g.b[part]) +", "(g.b[0]) +", "linear_act"),
    ("eps dropped", "rows.h", ": variance) + eps)", ": variance))", "add_layer_norm"),
    ("variance for its root", "rows.h", "1.f / __builtin_sqrtf(", "1.f / (", "add_layer_norm"),
    ("mean of the gradient ignored", "rows.h", "load(grad + j) - mean_a -", "load(grad + j) -", "add_layer_norm"),
    ("mean's rounding left in backward", "rows.h", "- mean - low) * rstd", "- mean) * rstd", "add_layer_norm"),
    ("mean's rounding left in forward", "add_layer_norm", "- mean - low) * rstd", "- mean) * rstd", "add_layer_norm"),
    ("mean's rounding left in embeddings", "embedding_layer_norm", "- mean - low) * rstd", "- mean) * rstd", "embedding_layer_norm"),
    ("gradient's mean of other products", "rows.h", "store(grad + j, scaled);", "store(grad + j, g * (weight.at(j, n) * 1.0000001f));", "add_layer_norm"),
    ("column sums over half the rows", "rows.h", "chunk < chunks; ++chunk)", "chunk < chunks; chunk += 2)", "add_layer_norm"),
    ("RMS norm takes the mean off", "add_layer_norm", "if (g.rms)", "if (false)", "add_layer_norm"),
    ("RMS norm's gradient loses its mean", "rows.h", "rms ? 0 : sum(a)", "sum(a)", "add_layer_norm"),
    ("SiLU's derivative without its slope", "vec.h", "return s + x * s * (1.f - s);", "return s;", "linear_act"),
    ("gradient of the ungated", "gated_act", "d * gate * derivative", "d * derivative", "gated_act"),
    ("no dropout in a gate's gradient", "gated_act", "d = drop(d, bits, g.dropout);", ";", "gated_act"),
    ("turned back as forth", "rotary", "g.inverse ? -1.f : 1.f", "1.f", "rotary"),
    ("keys not turned", "rotary", "g.dim, 2 * g.heads,", "g.dim, g.heads,", "rotary"),
    ("residual dropped", "add_layer_norm", "if (residual) v +=", "if (false) v +=", "add_layer_norm"),
    ("type embedding dropped", "embedding_layer_norm", "if (type) v +=", "if (false) v +=", "embedding_layer_norm"),
    ("position one off", "embedding_layer_norm", "g.positions[t] * g.hidden", "(g.positions[t] ^ 1) * g.hidden", "embedding_layer_norm"),
    ("a row's gradients overwrite", "embedding_layer_norm", "load_upto(to + j, left) + load_upto(x", "load_upto(x", "embedding_layer_norm"),
    ("label not subtracted", "masked_cross_entropy", "splat(p - 1)", "splat(p)", "masked_cross_entropy"),
    ("logits without their maximum", "masked_cross_entropy", "load_upto(z + j, n - j) - m)", "load_upto(z + j, n - j))", "masked_cross_entropy"),
    ("ignored rows count", "masked_cross_entropy", "if (g.labels[r] != g.ignore_index) {", "if (g.labels[r] >= 0) {", "masked_cross_entropy"),
    ("chunks overwrite the weight's gradient", "linear_act", "if (g.accumulate) z", "if (false) z", "masked_cross_entropy"),
    ("residual of a frozen layer dropped", "encoder", "v + load(x + at)", "v", "frozen"),
    ("frozen softmax without its maximum's scale", "attention_head.h", "(load(s + j) - from) * in_twos", "load(s + j) * in_twos - from", "frozen"),
    ("frozen keys past the end seen", "attention_head.h", "only(load(s + j), high - j, splat(-kInf))", "load(s + j)", "frozen"),
    ("frozen queries of the wrong head", "encoder_attention.h", "*q = from + h * dim", "*q = from + (spec.heads - 1 - h) * dim", "frozen"),
    ("frozen rows kept from the front", "encoder", "hidden + batch.rows[i] * hidden_row", "hidden + i * hidden_row", "frozen"),
    ("int8 row scale off", "packed_linear.h", "to.scale[m] = 1 / inverse", "to.scale[m] = 1.2f / inverse", "frozen"),
    ("int8 rows start at 0", "packed_linear.h", "load(w.sum + n) * a.low[row]", "load(w.sum + n) * 0.f", "frozen"),
    ("AVX2: int8 sums saturate", "pack_weights.h", "if (kSums16<u>) top", "if (false) top", "isa"),
    ("AVX2: int8 sums of one unit alone bounded", "pack_weights.h", "sums[k / 2 % 2][w < 0]", "sums[k / 2 % 4][w < 0]", "isa"),
    ("int8 projection of uncentred rows", "encoder.cpp", "aside ? less : to", "to", "frozen"),
    ("the first layer's input isn't smoothed", "encoder.cpp", "if (smooth) v *=", "if (false) v *=", "frozen"),
    ("a norm's result isn't smoothed", "encoder_norm.h", "g.smooth ? v *", "false ? v *", "frozen"),
    ("int8 norm's bias taken twice", "encoder_norm.h", "is_int8(p) ? bare : whole", "whole", "frozen"),
    ("bias of the encoder's scores ignored", "encoder_attention.h", "if (!bias.data) return scale;", "return scale;", "whole_cpu"),
    ("live queries for keys and values", "pack_weights.h", "static_cast<const T*>(from.part[s.part].weight)", "static_cast<const T*>(from.part[0].weight)", "whole_cpu"),
    ("lying queries for keys and values", "pack_weights.h", "weight = from.part[s.part].weight", "weight = from.part[0].weight", "whole_cpu"),
    ("live weights of the first layer for all", "encoder_layers.h", "g.live ? g.live[i] : LayerWeights{}", "g.live ? g.live[0] : LayerWeights{}", "whole_cpu"),
    ("weights turned where they lie", "../layouts.cpp", "found.insert(found.end(), t.strides, t.strides + t.ndim);", "", "whole_cpu"),
    ("lying panels are all the first", "lying_linear.h", "lying_rows<u>(live, k, p,", "lying_rows<u>(live, k, 0,", "whole_cpu"),
    ("a second tile of few rows over the first", "rows_dot.h", "out + m * NR + c", "out + c", "whole_cpu"),
    ("half of the lanes of a panel", "lying_linear.h", "if (rows - m > W)", "if (rows - m > 2 * W)", "whole_cpu"),
    ("sums of dot products change places", "rows_dot.h", "out[1] = folded[2 * q]", "out[1] = folded[q]", "whole_cpu"),
    ("dot products without the last k", "rows_dot.h", "if (j < units) add(", "if (false) add(", "whole_kinds"),
    ("AVX2: a NaN in an int8 row is none", "packed_linear.h", "Isa::kByteZero + sum(poison);", "Isa::kByteZero;", "frozen_edges"),
    ("int8: the last k of 4 n + 1 dropped", "pack_weights.h", "row && k < to.k ? to_float", "row && k < to.k - (to.k % 4 == 1) ? to_float", "frozen_edges"),
    ("bf16: ties round up", "isa/generic.h", "(u + 0x7fff + ((u >> 16) & 1)) >> 16", "(u + 0x8000) >> 16", "linear_act"),
    ("bf16: a NaN of all bits rounds to -0", "isa/generic.h", "v == v ? rounded : (u >> 16) | 0x40", "rounded", "frozen_edges"),
    ("coarse GELU cut at 3", "vec.h", "return x > 4.f ? x : (x < -4.f", "return x > 3.f ? x : (x < -3.f", "frozen_edges"),
    ("softmax is 0 below 2^-80", "vec.h", "x < -126.f", "x < -80.f", "attention"),
    ("exp is 0 below -60", "vec.h", "low = splat(-87.33f)", "low = splat(-60.f)", "attention"),
    ("frozen positions counted by kept tokens", "../encoder_bindings.cpp", "positions.push_back(j)", "positions.push_back(int64_t(positions.size()) - starts.back())", "frozen_edges"),
    ("AMX: the least part of a float dropped", "isa/avx512_amx.h", "        BERTFAST_LOAD_A(2);\n        BERTFAST_DOTS\n", "", "linear_act"),
    ("AMX: the second bf16 of weights dropped", "isa/avx512_amx.h", "        BERTFAST_LOAD_B(1);\n        BERTFAST_DOTS\n", "", "linear_act"),
    ("AMX: a frozen panel's split stops early", "packed_linear.h", "0, steps * kStep * 2};", "0, steps * kStep * 2 - 1};", "frozen"),
    ("AMX: frozen bias added again", "packed_linear.h", "part.k0 ? v : v +", "v +", "frozen"),
    ("AMX: later inner activations overwrite", "encoder", "before = c ? sum : x;", "before = x;", "frozen"),
    ("padding not zeroed", "pack", "std::memset(out + r * row_bytes, 0, row_bytes);", "(void)r;", "pack"),
    ("write past the end", "pack", "std::memcpy(out + t * row_bytes, x + rows[t] * row_bytes, row_bytes);", "std::memcpy(out + t * row_bytes, x + rows[t] * row_bytes, row_bytes), out[tokens * row_bytes] = 0;", "pack"),
    ("CUDA: barrier of a sum missing", "cuda/math.h", "  __syncthreads();\n  v = parts[0];", "  v = parts[0];", "add_layer_norm"),
    ("CUDA: half of the blocks' sums", "cuda/rows.h", "g < kGroups; ++g)", "g < kGroups; g += 2)", "linear_act"),
    ("CUDA: dropout not in the embedding's backward", "cuda/embedding_layer_norm.cu", "      drop8(in, t, j, g[c]);\n", "", "embedding_layer_norm"),
    ("CUDA: keys past the end seen", "cuda/attention.h", "if (key >= n_k || query >= n_q", "if (query >= n_q", "attention_cuda"),
    ("CUDA: as many keys as queries", "cuda/attention.h", "if (key >= n_k ||", "if (key >= n_q ||", "cross_attention"),
    ("CUDA: keys' gradients where queries start", "cuda/attention_backward.cu", "task.start_k * b.dkv_token", "task.start_q * b.dkv_token", "cross_attention"),
    ("CUDA: a walk past the last query begun", "cuda/fragments.h", "if (resident_ || first >= end) return;", "if (resident_) return;", "cross_attention"),
    ("CUDA: output not rescaled", "cuda/attention.cu", "d[j][2 * half] *= rescale, d[j][2 * half + 1] *= rescale;", "(void)d;", "attention_cuda"),
    ("CUDA: a stage loaded too early", "cuda/fragments.h", "    __syncthreads();  // all have read", "    // all have read", "cuda_host"),
    ("decoding: the past stays where beams were", "decoder", "j < g.done ? slots[j] : m", "m", "decoding_cpu"),
    ("decoding: a panel's filling wins", "decoder", "v = left < W ? only(v, left, splat(-kInf)) : v;", "", "decoding_cpu"),
    ("decoding: the last of the largest", "decoder", "? i < j : a > b", "? i > j : a > b", "decoding_cpu"),
    ("decoding: all rows see the first source", "decoder", "start = g.cu_seqlens[g.source[m]]", "start = g.cu_seqlens[0]", "decoding_cpu"),
    ("CUDA: a stage used too early", "cuda/fragments.h", "    wait_copies<1>();\n", "", "attention_cuda"),
    ("CUDA: dropout's bits of the other row", "cuda/attention.h", "bits_[0] = odd_ ? other : mine;", "bits_[0] = odd_ ? mine : other;", "attention_cuda"),
    ("CUDA: transposed dropout mask", "cuda/attention.h", "return bits_[e] >> (4 * tile + which_) & 1;", "return bits_[e ^ 1] >> (4 * tile + which_) & 1;", "attention_cuda"),
]  # fmt: skip
# "i/n": every n-th from the i-th on. All of them take a quarter of an hour and more.
FIRST, STEP = map(int, os.environ.get("BERTFAST_SHARE", "0/1").split("/"))
CHOSEN = MUTANTS[FIRST::STEP]


def source_of(tree, file):
    folder = "csrc" if file.startswith("cuda/") else "csrc/cpu"
    return tree / folder / (file if "." in file else f"{file}.cpp")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, configured for this machine's instruction set and built once."""
    tree = tmp_path_factory.mktemp("mutants")
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    options = ("-DBERTFAST_CUDA_HOST=ON", "-DBERTFAST_ONE_ISA=ON")
    build_extension(tree / "build", *options, source=tree)
    return tree


def build(tree):
    done = subprocess.run(["cmake", "--build", tree / "build"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def run_tests(tree, stem, cuda):
    command = [str(Path(sys.executable).parent / "pytest"), "-x", "-q", file_of(stem)]
    command += ["-k", "cuda" if cuda else "not cuda and not triton"]
    env = os.environ | {"BERTFAST_EXTENSION": str(tree / "build" / "_C.so")}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("stem, cuda", sorted({(m[4], m[1].startswith("cuda/")) for m in CHOSEN}))
def test_the_sources_pass(tree, stem, cuda):
    done = run_tests(tree, stem, cuda)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name, file, old, new, stem", CHOSEN, ids=[m[0] for m in CHOSEN])
def test_fault_is_caught(tree, name, file, old, new, stem):
    isas = {
        "AMX": ["avx512_amx"],
        "AVX2": ["avx2", "avx512"],
        "bf16": ["avx512", "avx2", "baseline"],
    }.get(name.split(":")[0])
    if isas and C.build_info()["cpu_isa"] not in isas:
        pytest.skip(f"nothing would run it on this processor, which has none of {isas}")
    path = source_of(tree, file)
    source = path.read_text()
    assert source.count(old) == 1, (
        f"{name}: {old!r} occurs {source.count(old)} times in {path.name}"
    )
    path.write_text(source.replace(old, new))
    try:
        build(tree)
        done = run_tests(tree, stem, file.startswith("cuda/"))
    finally:
        path.write_text(source)
    # 1: a test failed; a crash of the process (negative) is a catch too
    assert done.returncode == 1 or done.returncode < 0, f"{name} survived:\n{done.stdout[-1000:]}"
    assert "error during collection" not in done.stdout


def test_gate_is_complete():
    assert len(MUTANTS) >= 20
    for name, file, old, _, _ in MUTANTS:
        path = source_of(ROOT, file)
        assert path.read_text().count(old) == 1, f"{name}: adapt the gate to {path.name}"
