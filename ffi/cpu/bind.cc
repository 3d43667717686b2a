// The Python extension jaxint8._cpu: decodes FFI calls into Jobs and runs them on XLA's own thread pool. No arithmetic.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>

#include "attend.h"
#include "ceilings.h"
#include "int8.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace jaxint8::cpu {
namespace {

namespace ffi = xla::ffi;
namespace py = pybind11;

// Attributes of a call, decoded; the names are those of jaxint8/kernels.py.
struct Attributes {
  int64_t rule, column_scope, topk, float_outliers, rung;
  float value;
};

ffi::Error Decode(const Attributes& attributes, Problem* p) {
  p->rung = FindRung(attributes.rung);
  if (p->rung == nullptr) {
    return ffi::Error::InvalidArgument("rung: index " + std::to_string(attributes.rung) +
                                       " is unknown or not supported by this machine");
  }
  if (attributes.rule < 0 || attributes.rule > 3) return ffi::Error::InvalidArgument("rule: expected 0..3");
  p->options.rule = static_cast<Rule>(attributes.rule);
  p->options.column_scope = attributes.column_scope != 0;
  p->options.float_outliers = attributes.float_outliers != 0;
  p->options.value = attributes.value;
  p->options.topk = attributes.topk;
  if (p->options.rule == Rule::kTopK && attributes.topk < 1) return ffi::Error::InvalidArgument("topk: expected >= 1");
  if (p->k > kMaxK) return ffi::Error::InvalidArgument("k: expected at most " + std::to_string(kMaxK));
  return ffi::Error::Success();
}

bool DecodeType(ffi::DataType given, Type* type) {
  switch (given) {
    case ffi::DataType::F32:
      *type = Type::kF32;
      return true;
    case ffi::DataType::BF16:
      *type = Type::kBF16;
      return true;
    case ffi::DataType::F16:
      *type = Type::kF16;
      return true;
    default:
      return false;
  }
}

ffi::Error DecodeRows(const ffi::AnyBuffer& x, Problem* p) {
  if (x.dimensions().size() != 2) return ffi::Error::InvalidArgument("x: expected rank 2");
  if (!DecodeType(x.element_type(), &p->type)) {
    return ffi::Error::InvalidArgument("x: expected float32, bfloat16 or float16");
  }
  p->m = x.dimensions()[0];
  p->k = x.dimensions()[1];
  p->x = x.untyped_data();
  return ffi::Error::Success();
}

// What stands before the layer, from its attributes and the weights of its norm; `k` is that of x until here.
ffi::Error DecodePrologue(int64_t prologue, float epsilon, const ffi::BufferR1<ffi::F32>& norm, Problem* p) {
  if (prologue < 0 || prologue > 2) return ffi::Error::InvalidArgument("prologue: expected 0..2");
  p->prologue.kind = static_cast<Prologue::Kind>(prologue);
  if (p->prologue.kind == Prologue::Kind::kSiluGate) {
    if (p->k % 2 != 0) return ffi::Error::InvalidArgument("x: expected a gate and as many columns again");
    p->k /= 2;
  }
  const bool normed = p->prologue.kind == Prologue::Kind::kRmsNorm;
  if (norm.dimensions()[0] != (normed ? p->k : 0)) {
    return ffi::Error::InvalidArgument("norm: expected float32[k], or [0] without an RMSNorm");
  }
  p->prologue.epsilon = epsilon;
  p->prologue.norm = normed ? norm.typed_data() : nullptr;
  return ffi::Error::Success();
}

ffi::Error RunOn(ffi::ThreadPool& pool, Phased& job) {
  const bool ok = RunJob(job, pool.num_threads(), [&pool](auto task) { pool.Schedule(std::move(task)); });
  return ok ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxint8: out of memory");
}

ffi::Error Run(const Problem& problem, ffi::ThreadPool& pool) {
  Job job(problem);
  return RunOn(pool, job);
}

// Three layers of one call, each of which reads what the one before it wrote.
ffi::Error RunAll(const Problem (&problems)[3], ffi::ThreadPool& pool) {
  Job first(problems[0]), second(problems[1]), third(problems[2]);
  Phased* const jobs[] = {&first, &second, &third};
  const bool ok = RunJobs(jobs, 3, pool.num_threads(), [&pool](auto task) { pool.Schedule(std::move(task)); });
  return ok ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxint8: out of memory");
}

bool Is(const ffi::AnyBuffer::Dimensions& dimensions, int64_t rows, int64_t columns) {
  return dimensions.size() == 2 && dimensions[0] == rows && dimensions[1] == columns;
}

ffi::Error Quantize(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::BufferR2<ffi::S8>> lo,
                    ffi::Result<ffi::BufferR2<ffi::S8>> hi, ffi::Result<ffi::BufferR1<ffi::F32>> row_scale,
                    int64_t rule, int64_t column_scope, float value, int64_t topk, int64_t float_outliers,
                    int64_t rung) {
  Problem p{};
  p.kind = Problem::Kind::kQuantize;
  if (ffi::Error e = DecodeRows(x, &p); e.failure()) return e;
  if (ffi::Error e = Decode({rule, column_scope, topk, float_outliers, rung, value}, &p); e.failure()) return e;
  if (!Is(lo->dimensions(), p.m, p.k) || !Is(hi->dimensions(), p.m, p.k) || row_scale->dimensions()[0] != p.m) {
    return ffi::Error::InvalidArgument("lo, hi, row_scale: expected the shape of x");
  }
  p.lo = lo->typed_data();
  p.hi = hi->typed_data();
  p.row_scale = row_scale->typed_data();
  return Run(p, pool);
}

ffi::Error Product(ffi::ThreadPool pool, ffi::BufferR2<ffi::S8> a, ffi::BufferR2<ffi::S8> w,
                   ffi::Result<ffi::BufferR2<ffi::S32>> y, int64_t rung) {
  Problem p{};
  p.kind = Problem::Kind::kProduct;
  p.type = Type::kS32;
  p.m = a.dimensions()[0];
  p.k = a.dimensions()[1];
  p.n = w.dimensions()[0];
  p.x = a.typed_data();
  p.w = w.typed_data();
  p.y = y->typed_data();
  if (ffi::Error e = Decode({0, 0, 0, 0, rung, 0}, &p); e.failure()) return e;
  if (!Is(w.dimensions(), p.n, p.k) || !Is(y->dimensions(), p.m, p.n)) {
    return ffi::Error::InvalidArgument("codes: expected int8[n, k] to fit a int8[m, k]");
  }
  return Run(p, pool);
}

// Weights, scales and bias of one layer.
ffi::Error DecodeWeights(const ffi::BufferR2<ffi::S8>& w, const ffi::BufferR1<ffi::F32>& w_scale,
                         const ffi::BufferR1<ffi::F32>& bias, Problem* p) {
  p->n = w.dimensions()[0];
  const int64_t bias_length = bias.dimensions()[0];
  if (!Is(w.dimensions(), p->n, p->k) || w_scale.dimensions()[0] != p->n || (bias_length != 0 && bias_length != p->n)) {
    return ffi::Error::InvalidArgument("codes, scale, bias: expected int8[n, k], float32[n], float32[n] or [0]");
  }
  p->w = w.typed_data();
  p->w_scale = w_scale.typed_data();
  p->bias = bias_length == 0 ? nullptr : bias.typed_data();
  return ffi::Error::Success();
}

ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::BufferR2<ffi::S8> w, ffi::BufferR1<ffi::F32> w_scale,
                  ffi::BufferR1<ffi::F32> bias, ffi::BufferR1<ffi::F32> norm, ffi::AnyBuffer residual,
                  ffi::Result<ffi::AnyBuffer> y, int64_t rule, int64_t column_scope, float value, int64_t topk,
                  int64_t float_outliers, int64_t rung, int64_t prologue, float epsilon) {
  Problem p{};
  p.kind = Problem::Kind::kLinear;
  if (ffi::Error e = DecodeRows(x, &p); e.failure()) return e;
  if (ffi::Error e = DecodePrologue(prologue, epsilon, norm, &p); e.failure()) return e;
  if (ffi::Error e = Decode({rule, column_scope, topk, float_outliers, rung, value}, &p); e.failure()) return e;
  if (ffi::Error e = DecodeWeights(w, w_scale, bias, &p); e.failure()) return e;
  if (!Is(y->dimensions(), p.m, p.n) || y->element_type() != x.element_type()) {
    return ffi::Error::InvalidArgument("y: expected [m, n] of the dtype of x");
  }
  const bool adds = !Is(residual.dimensions(), 0, 0);
  if (residual.element_type() != x.element_type() || (adds && !Is(residual.dimensions(), p.m, p.n))) {
    return ffi::Error::InvalidArgument("residual: expected [m, n] of the dtype of x, or [0, 0]");
  }
  p.residual = adds ? residual.untyped_data() : nullptr;
  p.y = y->untyped_data();
  return Run(p, pool);
}

ffi::Error Enter(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::BufferR1<ffi::F32> norm, ffi::Result<ffi::AnyBuffer> y,
                 int64_t rung, int64_t prologue, float epsilon) {
  Problem p{};
  p.kind = Problem::Kind::kPrologue;
  if (ffi::Error e = DecodeRows(x, &p); e.failure()) return e;
  if (ffi::Error e = DecodePrologue(prologue, epsilon, norm, &p); e.failure()) return e;
  if (ffi::Error e = Decode({0, 0, 0, 0, rung, 0}, &p); e.failure()) return e;
  if (prologue == 0) return ffi::Error::InvalidArgument("prologue: expected one");
  if (!Is(y->dimensions(), p.m, p.k) || y->element_type() != x.element_type()) {
    return ffi::Error::InvalidArgument("y: expected [m, k] of the dtype of x");
  }
  p.y = y->untyped_data();
  return Run(p, pool);
}

// attended = residual + out(x); gated = up(RMSNorm(attended)); y = attended + down(SiluGate(gated)).
ffi::Error MlpBlock(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer residual, ffi::BufferR1<ffi::F32> norm,
                    ffi::BufferR2<ffi::S8> out_w, ffi::BufferR1<ffi::F32> out_scale, ffi::BufferR1<ffi::F32> out_bias,
                    ffi::BufferR2<ffi::S8> up_w, ffi::BufferR1<ffi::F32> up_scale, ffi::BufferR1<ffi::F32> up_bias,
                    ffi::BufferR2<ffi::S8> down_w, ffi::BufferR1<ffi::F32> down_scale,
                    ffi::BufferR1<ffi::F32> down_bias, ffi::Result<ffi::AnyBuffer> y,
                    ffi::Result<ffi::AnyBuffer> attended, ffi::Result<ffi::AnyBuffer> gated, int64_t rule,
                    int64_t column_scope, float value, int64_t topk, int64_t float_outliers, int64_t rung,
                    float epsilon) {
  Problem out{};
  out.kind = Problem::Kind::kLinear;
  if (ffi::Error e = DecodeRows(x, &out); e.failure()) return e;
  const int64_t k = out.k;
  out.k = std::max({out.k, out_w.dimensions()[0], down_w.dimensions()[1]});  // the largest is within bounds
  if (ffi::Error e = Decode({rule, column_scope, topk, float_outliers, rung, value}, &out); e.failure()) return e;
  out.k = k;
  Problem up = out, down = out;
  if (ffi::Error e = DecodeWeights(out_w, out_scale, out_bias, &out); e.failure()) return e;
  up.k = out.n;
  if (ffi::Error e = DecodeWeights(up_w, up_scale, up_bias, &up); e.failure()) return e;
  down.k = up.n / 2;
  if (ffi::Error e = DecodeWeights(down_w, down_scale, down_bias, &down); e.failure()) return e;
  if (up.n % 2 != 0 || down.n != out.n || norm.dimensions()[0] != up.k) {
    return ffi::Error::InvalidArgument("norm, out, up, down: expected a block of h, [h, k], [2 * f, h], [h, f]");
  }
  if (!Is(residual.dimensions(), out.m, out.n) || !Is(y->dimensions(), out.m, out.n) ||
      !Is(attended->dimensions(), out.m, out.n) || !Is(gated->dimensions(), out.m, up.n) ||
      residual.element_type() != x.element_type() || y->element_type() != x.element_type() ||
      attended->element_type() != x.element_type() || gated->element_type() != x.element_type()) {
    return ffi::Error::InvalidArgument("residual, y: expected [m, h] of the dtype of x");
  }
  out.residual = residual.untyped_data();
  up.prologue = {Prologue::Kind::kRmsNorm, epsilon, norm.typed_data()};
  // Many rows pass the gate on their way out of a block of sums, which halves what is written and read again.
  up.gated = out.m > kSmallM;
  if (up.gated) up.n = down.k;
  if (!up.gated) down.prologue.kind = Prologue::Kind::kSiluGate;
  out.y = attended->untyped_data();
  up.x = down.residual = out.y;
  up.y = gated->untyped_data();
  down.x = up.y;
  down.y = y->untyped_data();
  return RunAll({out, up, down}, pool);
}

// Keys or values of a cache: codes and a scale for each slot, of which one changes.
struct Vectors {
  ffi::BufferR4<ffi::S8> codes;
  ffi::BufferR3<ffi::F32> scale;
};

bool Is(const Vectors& v, int64_t b, int64_t kv_heads, int64_t rows, int64_t columns, int64_t slots) {
  const auto codes = v.codes.dimensions(), scale = v.scale.dimensions();
  return codes[0] == b && codes[1] == kv_heads && codes[2] == rows && codes[3] == columns && scale[0] == b &&
         scale[1] == kv_heads && scale[2] == slots;
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::BufferR2<ffi::F32> cosine,
                  ffi::BufferR2<ffi::F32> sine, ffi::BufferR1<ffi::S32> start, ffi::BufferR1<ffi::S32> slot,
                  ffi::BufferR4<ffi::S8> key_codes, ffi::BufferR3<ffi::F32> key_scale,
                  ffi::BufferR4<ffi::S8> value_codes, ffi::BufferR3<ffi::F32> value_scale,
                  ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::BufferR4<ffi::S8>> new_key_codes,
                  ffi::Result<ffi::BufferR3<ffi::F32>> new_key_scale,
                  ffi::Result<ffi::BufferR4<ffi::S8>> new_value_codes,
                  ffi::Result<ffi::BufferR3<ffi::F32>> new_value_scale) {
  AttendProblem p{};
  p.rung = FindRung(-1);
  if (!DecodeType(qkv.element_type(), &p.type) || qkv.dimensions().size() != 2) {
    return ffi::Error::InvalidArgument("qkv: expected float32, bfloat16 or float16 of rank 2");
  }
  const auto shape = value_codes.dimensions();
  p.b = shape[0], p.kv_heads = shape[1], p.d = shape[2], p.slots = shape[3];
  if ((p.d != 64 && p.d != 128) || p.slots < 32 || p.slots % 32 != 0 || p.kv_heads < 1) {
    return ffi::Error::InvalidArgument("value_codes: expected int8[b, kv_heads, 64 or 128, a multiple of 32]");
  }
  p.heads = qkv.dimensions()[1] / p.d - 2 * p.kv_heads;
  if (!Is(qkv.dimensions(), p.b, (p.heads + 2 * p.kv_heads) * p.d) || p.heads < 1 || p.heads % p.kv_heads != 0 ||
      p.heads > kMostQueries * p.kv_heads) {
    return ffi::Error::InvalidArgument("qkv: expected [b, (heads + 2 * kv_heads) * d], up to 8 heads a kv_head");
  }
  if (!Is({key_codes, key_scale}, p.b, p.kv_heads, p.slots, p.d, p.slots) ||
      !Is({value_codes, value_scale}, p.b, p.kv_heads, p.d, p.slots, p.slots)) {
    return ffi::Error::InvalidArgument(
        "cache: expected int8[b, kv_heads, slots, d], int8[b, kv_heads, d, slots], float32[b, kv_heads, slots]");
  }
  const bool turns = !Is(cosine.dimensions(), 0, 0);
  if (turns && (!Is(cosine.dimensions(), p.b, p.d / 2) || !Is(sine.dimensions(), p.b, p.d / 2))) {
    return ffi::Error::InvalidArgument("cosine, sine: expected float32[b, d / 2], or [0, 0] without rotation");
  }
  if (start.dimensions()[0] != p.b || slot.dimensions()[0] != 1) {
    return ffi::Error::InvalidArgument("start, slot: expected int32[b], int32[1]");
  }
  if (!Is(y->dimensions(), p.b, p.heads * p.d) || y->element_type() != qkv.element_type()) {
    return ffi::Error::InvalidArgument("y: expected [b, heads * d] of the dtype of qkv");
  }
  if (new_key_codes->typed_data() != key_codes.typed_data() || new_key_scale->typed_data() != key_scale.typed_data() ||
      new_value_codes->typed_data() != value_codes.typed_data() ||
      new_value_scale->typed_data() != value_scale.typed_data()) {
    return ffi::Error::InvalidArgument("cache: expected results in the place of the operands");
  }
  if (p.b == 0) return ffi::Error::Success();
  p.qkv = qkv.untyped_data();
  p.cosine = turns ? cosine.typed_data() : nullptr;
  p.sine = turns ? sine.typed_data() : nullptr;
  p.start = start.typed_data();
  p.slot = slot.typed_data()[0];
  p.key_codes = new_key_codes->typed_data();
  p.key_scale = new_key_scale->typed_data();
  p.value_codes = new_value_codes->typed_data();
  p.value_scale = new_value_scale->typed_data();
  p.y = y->untyped_data();
  AttendJob job(p);
  return RunOn(pool, job);
}

XLA_FFI_DEFINE_HANDLER(kAttend, Attend,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::S32>>()
                           .Arg<ffi::BufferR1<ffi::S32>>()
                           .Arg<ffi::BufferR4<ffi::S8>>()
                           .Arg<ffi::BufferR3<ffi::F32>>()
                           .Arg<ffi::BufferR4<ffi::S8>>()
                           .Arg<ffi::BufferR3<ffi::F32>>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::BufferR4<ffi::S8>>()
                           .Ret<ffi::BufferR3<ffi::F32>>()
                           .Ret<ffi::BufferR4<ffi::S8>>()
                           .Ret<ffi::BufferR3<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER(kQuantize, Quantize,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::BufferR2<ffi::S8>>()
                           .Ret<ffi::BufferR2<ffi::S8>>()
                           .Ret<ffi::BufferR1<ffi::F32>>()
                           .Attr<int64_t>("rule")
                           .Attr<int64_t>("column_scope")
                           .Attr<float>("value")
                           .Attr<int64_t>("topk")
                           .Attr<int64_t>("float_outliers")
                           .Attr<int64_t>("rung"));

XLA_FFI_DEFINE_HANDLER(kProduct, Product,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Ret<ffi::BufferR2<ffi::S32>>()
                           .Attr<int64_t>("rung"));

XLA_FFI_DEFINE_HANDLER(kLinear, Linear,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<int64_t>("rule")
                           .Attr<int64_t>("column_scope")
                           .Attr<float>("value")
                           .Attr<int64_t>("topk")
                           .Attr<int64_t>("float_outliers")
                           .Attr<int64_t>("rung")
                           .Attr<int64_t>("prologue")
                           .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER(kEnter, Enter,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<int64_t>("rung")
                           .Attr<int64_t>("prologue")
                           .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER(kMlpBlock, MlpBlock,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<int64_t>("rule")
                           .Attr<int64_t>("column_scope")
                           .Attr<float>("value")
                           .Attr<int64_t>("topk")
                           .Attr<int64_t>("float_outliers")
                           .Attr<int64_t>("rung")
                           .Attr<float>("epsilon"));

template <typename Handler>
py::capsule Capsule(Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler));
}

py::dict Registrations() {
  py::dict targets;
  targets["jaxint8_quantize"] = Capsule(kQuantize);
  targets["jaxint8_product"] = Capsule(kProduct);
  targets["jaxint8_linear"] = Capsule(kLinear);
  targets["jaxint8_prologue"] = Capsule(kEnter);
  targets["jaxint8_mlp_block"] = Capsule(kMlpBlock);
  targets["jaxint8_attend"] = Capsule(kAttend);
  return targets;
}

// [(name, supported here)], best first; the position is the `rung` attribute.
py::list RungTable() {
  py::list table;
  int count = 0;
  const Rung* const* rungs = Rungs(&count);
  for (int i = 0; i < count; ++i) table.append(py::make_tuple(rungs[i]->name, rungs[i]->supported()));
  return table;
}

py::tuple PeakRate(int threads, double seconds) {
  if (threads < 1) throw py::value_error("threads: expected >= 1, got " + std::to_string(threads));
  Peak peak{};
  {
    py::gil_scoped_release release;
    peak = MeasurePeak(threads, seconds);
  }
  return py::make_tuple(peak.instruction, peak.multiplies_per_second);
}

double ReadRate(const py::buffer& data, int threads, double seconds) {
  if (threads < 1) throw py::value_error("threads: expected >= 1, got " + std::to_string(threads));
  const py::buffer_info info = data.request();
  if (PyBuffer_IsContiguous(info.view(), 'C') == 0) throw py::value_error("data: expected a contiguous buffer");
  py::gil_scoped_release release;
  return MeasureBandwidth(info.ptr, info.size * info.itemsize, threads, seconds);
}

}  // namespace
}  // namespace jaxint8::cpu

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of jaxint8; use jaxint8.kernels.";
  module.attr("jaxlib_version") = JAXINT8_JAXLIB_VERSION;
  module.attr("ffi_version") = pybind11::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  module.def("registrations", &jaxint8::cpu::Registrations, "FFI target name -> capsule.");
  module.def("rungs", &jaxint8::cpu::RungTable, "[(name, supported)], best first.");
  module.def("measure_peak", &jaxint8::cpu::PeakRate, pybind11::arg("threads"), pybind11::arg("seconds"),
             "(instruction, int8 multiplications per second).");
  module.def("measure_bandwidth", &jaxint8::cpu::ReadRate, pybind11::arg("data"), pybind11::arg("threads"),
             pybind11::arg("seconds"), "Bytes per second read from a buffer.");
}
