// The Python extension jaxint8._cuda: decodes FFI calls into Problems and queues them on XLA's stream. No arithmetic.
//
// Targets and attributes are those of the CPU's bind.cc, and jaxint8_largest, which has no attributes; each but
// jaxint8_attend has one result more, the workspace, because an allocation during the call could not be captured in a
// CUDA graph. `rung` is the path: -1 automatic, else the index in paths().
#include <pybind11/pybind11.h>

#include <string>

#include "int8.h"
#include "xla/ffi/api/ffi.h"

namespace jaxint8::cuda {
namespace {

namespace ffi = xla::ffi;
namespace py = pybind11;

using Stream = ffi::PlatformStream<CUstream_st*>;
using Workspace = ffi::Result<ffi::BufferR1<ffi::U8>>;

constexpr const char* kPathNames[] = {"stream", "tiled", "wgmma", "sparse"};
constexpr int64_t kPathCount = 4;

// Attributes of a call, decoded; the names are those of jaxint8/kernels.py.
struct Attributes {
  int64_t rule, column_scope, topk, float_outliers, rung;
  float value;
};

ffi::Error Invalid(const std::string& what) { return ffi::Error::InvalidArgument("jaxint8: " + what); }

ffi::Error Decode(const Attributes& attributes, Problem* p) {
  if (attributes.rung < -1 || attributes.rung >= kPathCount) return Invalid("rung: unknown path");
  if (attributes.rule < 0 || attributes.rule > 3) return Invalid("rule: expected 0..3");
  if (attributes.float_outliers != 0) return Invalid("float outliers have no CUDA kernel: use the xla implementation");
  p->path = static_cast<Path>(attributes.rung);
  p->options.rule = static_cast<Rule>(attributes.rule);
  p->options.column_scope = attributes.column_scope != 0;
  p->options.value = attributes.value;
  p->options.topk = attributes.topk;
  if (p->options.rule == Rule::kTopK && attributes.topk < 1) return Invalid("topk: expected >= 1");
  return ffi::Error::Success();
}

ffi::Error DecodePrologue(int64_t prologue, float epsilon, const ffi::BufferR1<ffi::F32>& norm, Problem* p) {
  if (prologue < 0 || prologue > 2) return Invalid("prologue: expected 0..2");
  p->prologue = static_cast<Prologue>(prologue);
  p->epsilon = epsilon;
  if (p->prologue == Prologue::kSiluGate) {
    if (p->k % 2 != 0) return Invalid("x: expected a gate and as many columns");
    p->k /= 2;
  }
  const int64_t wanted = p->prologue == Prologue::kRmsNorm ? p->k : 0;
  if (norm.dimensions()[0] != wanted) return Invalid("norm: expected float32[k] for an RMSNorm, else [0]");
  p->norm = norm.typed_data();
  return ffi::Error::Success();
}

// Before DecodePrologue, which halves k for a gate.
ffi::Error DecodeRows(const ffi::AnyBuffer& x, Problem* p) {
  if (x.dimensions().size() != 2) return Invalid("x: expected rank 2");
  switch (x.element_type()) {
    case ffi::DataType::F32:
      p->type = Type::kF32;
      break;
    case ffi::DataType::BF16:
      p->type = Type::kBF16;
      break;
    case ffi::DataType::F16:
      p->type = Type::kF16;
      break;
    default:
      return Invalid("x: expected float32, bfloat16 or float16");
  }
  p->m = x.dimensions()[0];
  p->k = x.dimensions()[1];
  p->x = x.untyped_data();
  return ffi::Error::Success();
}

ffi::Error GiveWorkspace(Problem* problems, int count, Workspace& workspace) {
  const int64_t bytes = workspace->dimensions()[0];
  for (int i = 0; i < count; ++i) {
    const int64_t needed = WorkspaceBytes(problems[i]);
    if (bytes < needed) {
      return Invalid("workspace: expected " + std::to_string(needed) + " bytes, got " + std::to_string(bytes));
    }
    problems[i].workspace = workspace->typed_data();
  }
  return ffi::Error::Success();
}

ffi::Error Result(const char* error) {
  return error == nullptr ? ffi::Error::Success() : ffi::Error::Internal(std::string("jaxint8: ") + error);
}

ffi::Error Queue(Problem p, Workspace& workspace, CUstream_st* stream) {
  if (ffi::Error e = GiveWorkspace(&p, 1, workspace); e.failure()) return e;
  return Result(Run(p, stream));
}

bool Is(const ffi::AnyBuffer::Dimensions& dimensions, int64_t rows, int64_t columns) {
  return dimensions.size() == 2 && dimensions[0] == rows && dimensions[1] == columns;
}

ffi::Error Quantize(CUstream_st* stream, ffi::AnyBuffer x, ffi::Result<ffi::BufferR2<ffi::S8>> lo,
                    ffi::Result<ffi::BufferR2<ffi::S8>> hi, ffi::Result<ffi::BufferR1<ffi::F32>> row_scale,
                    Workspace workspace, int64_t rule, int64_t column_scope, float value, int64_t topk,
                    int64_t float_outliers, int64_t rung) {
  Problem p{};
  p.kind = Problem::Kind::kQuantize;
  if (ffi::Error e = DecodeRows(x, &p); e.failure()) return e;
  if (ffi::Error e = Decode({rule, column_scope, topk, float_outliers, rung, value}, &p); e.failure()) return e;
  if (!Is(lo->dimensions(), p.m, p.k) || !Is(hi->dimensions(), p.m, p.k) || row_scale->dimensions()[0] != p.m) {
    return Invalid("lo, hi, row_scale: expected the shape of x");
  }
  p.lo = lo->typed_data();
  p.hi = hi->typed_data();
  p.row_scale = row_scale->typed_data();
  return Queue(p, workspace, stream);
}

ffi::Error Product(CUstream_st* stream, ffi::BufferR2<ffi::S8> a, ffi::BufferR2<ffi::S8> w,
                   ffi::Result<ffi::BufferR2<ffi::S32>> y, Workspace workspace, int64_t rung) {
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
    return Invalid("codes: expected int8[n, k] to fit a int8[m, k]");
  }
  return Queue(p, workspace, stream);
}

// Weights, scales and bias of one layer.
ffi::Error DecodeWeights(const ffi::BufferR2<ffi::S8>& w, const ffi::BufferR1<ffi::F32>& w_scale,
                         const ffi::BufferR1<ffi::F32>& bias, Problem* p) {
  p->n = w.dimensions()[0];
  const int64_t bias_length = bias.dimensions()[0];
  if (!Is(w.dimensions(), p->n, p->k) || w_scale.dimensions()[0] != p->n || (bias_length != 0 && bias_length != p->n)) {
    return Invalid("codes, scale, bias: expected int8[n, k], float32[n], float32[n] or [0]");
  }
  p->w = w.typed_data();
  p->w_scale = w_scale.typed_data();
  p->bias = bias_length == 0 ? nullptr : bias.typed_data();
  return ffi::Error::Success();
}

ffi::Error Linear(CUstream_st* stream, ffi::AnyBuffer x, ffi::BufferR2<ffi::S8> w, ffi::BufferR1<ffi::F32> w_scale,
                  ffi::BufferR1<ffi::F32> bias, ffi::BufferR1<ffi::F32> norm, ffi::AnyBuffer residual,
                  ffi::Result<ffi::AnyBuffer> y, Workspace workspace, int64_t rule, int64_t column_scope, float value,
                  int64_t topk, int64_t float_outliers, int64_t rung, int64_t prologue, float epsilon) {
  Problem p{};
  p.kind = Problem::Kind::kLinear;
  if (ffi::Error e = DecodeRows(x, &p); e.failure()) return e;
  if (ffi::Error e = Decode({rule, column_scope, topk, float_outliers, rung, value}, &p); e.failure()) return e;
  if (ffi::Error e = DecodePrologue(prologue, epsilon, norm, &p); e.failure()) return e;
  if (ffi::Error e = DecodeWeights(w, w_scale, bias, &p); e.failure()) return e;
  if (!Is(y->dimensions(), p.m, p.n) || y->element_type() != x.element_type()) {
    return Invalid("y: expected [m, n] of the dtype of x");
  }
  const bool adds = !Is(residual.dimensions(), 0, 0);
  if (residual.element_type() != x.element_type() || (adds && !Is(residual.dimensions(), p.m, p.n))) {
    return Invalid("residual: expected [m, n] of the dtype of x, or [0, 0]");
  }
  p.residual = adds ? residual.untyped_data() : nullptr;
  p.y = y->untyped_data();
  return Queue(p, workspace, stream);
}

ffi::Error PrologueAlone(CUstream_st* stream, ffi::AnyBuffer x, ffi::BufferR1<ffi::F32> norm,
                         ffi::Result<ffi::AnyBuffer> y, Workspace workspace, int64_t prologue, float epsilon,
                         int64_t rung) {
  Problem p{};
  p.kind = Problem::Kind::kPrologue;
  if (ffi::Error e = DecodeRows(x, &p); e.failure()) return e;
  if (ffi::Error e = Decode({0, 0, 0, 0, rung, 0}, &p); e.failure()) return e;
  if (ffi::Error e = DecodePrologue(prologue, epsilon, norm, &p); e.failure()) return e;
  if (p.prologue == Prologue::kNone) return Invalid("prologue: expected 1 or 2");
  if (!Is(y->dimensions(), p.m, p.k) || y->element_type() != x.element_type()) {
    return Invalid("y: expected [m, k] of the dtype of x");
  }
  p.y = y->untyped_data();
  return Queue(p, workspace, stream);
}

// attended = residual + out(x); gated = up(RMSNorm(attended)); y = attended + down(SiluGate(gated)).
ffi::Error MlpBlock(CUstream_st* stream, ffi::AnyBuffer x, ffi::AnyBuffer residual, ffi::BufferR1<ffi::F32> norm,
                    ffi::BufferR2<ffi::S8> out_w, ffi::BufferR1<ffi::F32> out_scale, ffi::BufferR1<ffi::F32> out_bias,
                    ffi::BufferR2<ffi::S8> up_w, ffi::BufferR1<ffi::F32> up_scale, ffi::BufferR1<ffi::F32> up_bias,
                    ffi::BufferR2<ffi::S8> down_w, ffi::BufferR1<ffi::F32> down_scale,
                    ffi::BufferR1<ffi::F32> down_bias, ffi::Result<ffi::AnyBuffer> y,
                    ffi::Result<ffi::AnyBuffer> attended, ffi::Result<ffi::AnyBuffer> gated, Workspace workspace,
                    int64_t rule, int64_t column_scope, float value, int64_t topk, int64_t float_outliers, int64_t rung,
                    float epsilon) {
  Problem out{};
  out.kind = Problem::Kind::kLinear;
  if (ffi::Error e = DecodeRows(x, &out); e.failure()) return e;
  if (ffi::Error e = Decode({rule, column_scope, topk, float_outliers, rung, value}, &out); e.failure()) return e;
  Problem up = out, down = out;
  if (ffi::Error e = DecodeWeights(out_w, out_scale, out_bias, &out); e.failure()) return e;
  up.k = out.n;
  if (ffi::Error e = DecodeWeights(up_w, up_scale, up_bias, &up); e.failure()) return e;
  down.k = up.n / 2;
  if (ffi::Error e = DecodeWeights(down_w, down_scale, down_bias, &down); e.failure()) return e;
  if (up.n % 2 != 0 || down.n != out.n || norm.dimensions()[0] != up.k) {
    return Invalid("norm, out, up, down: expected a block of h, [h, k], [2 * f, h], [h, f]");
  }
  const auto fits = [&](const ffi::AnyBuffer& a, int64_t columns) {
    return Is(a.dimensions(), out.m, columns) && a.element_type() == x.element_type();
  };
  if (!fits(residual, out.n) || !fits(*y, out.n) || !fits(*attended, out.n) || !fits(*gated, up.n)) {
    return Invalid("residual, y: expected [m, h] of the dtype of x");
  }
  out.residual = residual.untyped_data();
  up.prologue = Prologue::kRmsNorm;
  up.epsilon = epsilon;
  up.norm = norm.typed_data();
  down.prologue = Prologue::kSiluGate;
  out.y = attended->untyped_data();
  up.x = down.residual = out.y;
  up.y = gated->untyped_data();
  down.x = up.y;
  down.y = y->untyped_data();
  Problem layers[3] = {out, up, down};
  if (ffi::Error e = GiveWorkspace(layers, 3, workspace); e.failure()) return e;
  return Result(RunBlock(layers, stream));
}

ffi::Error ChooseOfRows(CUstream_st* stream, ffi::BufferR2<ffi::F32> x, ffi::Result<ffi::BufferR2<ffi::S32>> y,
                        Workspace workspace) {
  Problem p{};
  p.kind = Problem::Kind::kLargest;
  p.m = x.dimensions()[0];
  p.k = x.dimensions()[1];
  p.n = y->dimensions()[1];
  if (y->dimensions()[0] != p.m) return Invalid("y: expected int32[m, count]");
  p.x = x.typed_data();
  p.y = y->typed_data();
  return Queue(p, workspace, stream);
}

using Codes = ffi::BufferR4<ffi::S8>;
using Scales = ffi::BufferR3<ffi::F32>;

// The cache's buffers are those of the results.
ffi::Error Attend(CUstream_st* stream, ffi::AnyBuffer qkv, ffi::BufferR2<ffi::F32> cosine, ffi::BufferR2<ffi::F32> sine,
                  ffi::BufferR1<ffi::S32> start, ffi::BufferR1<ffi::S32> slot, Codes keys, Scales key_scale,
                  Codes values, Scales value_scale, ffi::Result<ffi::AnyBuffer> y, ffi::Result<Codes> new_keys,
                  ffi::Result<Scales> new_key_scale, ffi::Result<Codes> new_values,
                  ffi::Result<Scales> new_value_scale) {
  Problem x{};
  if (ffi::Error e = DecodeRows(qkv, &x); e.failure()) return e;
  const auto of_values = values.dimensions(), of_keys = keys.dimensions();
  Attention a{};
  a.type = x.type;
  a.rows = x.m;
  a.kv_heads = of_values[1];
  a.d = of_values[2];
  a.slots = of_values[3];
  const int64_t width = a.kv_heads * a.d;
  if (width == 0 || x.k % width != 0 || x.k < 3 * width) return Invalid("qkv: expected heads of q, k and v");
  a.queries = x.k / width - 2;
  const auto fits = [&a](const Scales& scale) {
    const auto d = scale.dimensions();
    return d[0] == a.rows && d[1] == a.kv_heads && d[2] == a.slots;
  };
  if (of_values[0] != a.rows || of_keys[0] != a.rows || of_keys[1] != a.kv_heads || of_keys[2] != a.slots ||
      of_keys[3] != a.d || !fits(key_scale) || !fits(value_scale)) {
    return Invalid("keys, values: expected int8[b, kv_heads, slots, d], int8[b, kv_heads, d, slots] and scales");
  }
  if (keys.typed_data() != new_keys->typed_data() || key_scale.typed_data() != new_key_scale->typed_data() ||
      values.typed_data() != new_values->typed_data() || value_scale.typed_data() != new_value_scale->typed_data()) {
    return Invalid("keys, values: expected results in their place");
  }
  const bool rotated = cosine.element_count() > 0;
  if (rotated && (!Is(cosine.dimensions(), a.rows, a.d / 2) || !Is(sine.dimensions(), a.rows, a.d / 2))) {
    return Invalid("cosine, sine: expected float32[b, d / 2] or [0, 0]");
  }
  if (start.dimensions()[0] != a.rows || slot.dimensions()[0] != 1) return Invalid("start, slot: expected [b], [1]");
  if (!Is(y->dimensions(), a.rows, a.queries * width) || y->element_type() != qkv.element_type()) {
    return Invalid("y: expected [b, heads * d] of the dtype of qkv");
  }
  a.qkv = x.x;
  a.cosine = rotated ? cosine.typed_data() : nullptr;
  a.sine = rotated ? sine.typed_data() : nullptr;
  a.start = start.typed_data();
  a.slot = slot.typed_data();
  a.keys = new_keys->typed_data();
  a.key_scale = new_key_scale->typed_data();
  a.values = new_values->typed_data();
  a.value_scale = new_value_scale->typed_data();
  a.y = y->untyped_data();
  return Result(RunAttention(a, stream));
}

XLA_FFI_DEFINE_HANDLER(kQuantize, Quantize,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::BufferR2<ffi::S8>>()
                           .Ret<ffi::BufferR2<ffi::S8>>()
                           .Ret<ffi::BufferR1<ffi::F32>>()
                           .Ret<ffi::BufferR1<ffi::U8>>()
                           .Attr<int64_t>("rule")
                           .Attr<int64_t>("column_scope")
                           .Attr<float>("value")
                           .Attr<int64_t>("topk")
                           .Attr<int64_t>("float_outliers")
                           .Attr<int64_t>("rung"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kProduct, Product,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Ret<ffi::BufferR2<ffi::S32>>()
                           .Ret<ffi::BufferR1<ffi::U8>>()
                           .Attr<int64_t>("rung"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kLinear, Linear,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::BufferR1<ffi::U8>>()
                           .Attr<int64_t>("rule")
                           .Attr<int64_t>("column_scope")
                           .Attr<float>("value")
                           .Attr<int64_t>("topk")
                           .Attr<int64_t>("float_outliers")
                           .Attr<int64_t>("rung")
                           .Attr<int64_t>("prologue")
                           .Attr<float>("epsilon"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kPrologue, PrologueAlone,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::BufferR1<ffi::U8>>()
                           .Attr<int64_t>("prologue")
                           .Attr<float>("epsilon")
                           .Attr<int64_t>("rung"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kMlpBlock, MlpBlock,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
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
                           .Ret<ffi::BufferR1<ffi::U8>>()
                           .Attr<int64_t>("rule")
                           .Attr<int64_t>("column_scope")
                           .Attr<float>("value")
                           .Attr<int64_t>("topk")
                           .Attr<int64_t>("float_outliers")
                           .Attr<int64_t>("rung")
                           .Attr<float>("epsilon"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kLargest, ChooseOfRows,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Ret<ffi::BufferR2<ffi::S32>>()
                           .Ret<ffi::BufferR1<ffi::U8>>(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kAttend, Attend,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::S32>>()
                           .Arg<ffi::BufferR1<ffi::S32>>()
                           .Arg<Codes>()
                           .Arg<Scales>()
                           .Arg<Codes>()
                           .Arg<Scales>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<Codes>()
                           .Ret<Scales>()
                           .Ret<Codes>()
                           .Ret<Scales>(),
                       {ffi::Traits::kCmdBufferCompatible});

template <typename Handler>
py::capsule Capsule(Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler));
}

py::dict Registrations() {
  py::dict targets;
  targets["jaxint8_quantize"] = Capsule(kQuantize);
  targets["jaxint8_product"] = Capsule(kProduct);
  targets["jaxint8_linear"] = Capsule(kLinear);
  targets["jaxint8_prologue"] = Capsule(kPrologue);
  targets["jaxint8_mlp_block"] = Capsule(kMlpBlock);
  targets["jaxint8_largest"] = Capsule(kLargest);
  targets["jaxint8_attend"] = Capsule(kAttend);
  return targets;
}

py::tuple Paths() {
  py::tuple names(kPathCount);
  for (int64_t i = 0; i < kPathCount; ++i) names[static_cast<size_t>(i)] = py::str(kPathNames[i]);
  return names;
}

// The size of the workspace result of a call of that target; k is the layer's, itemsize of x (the largest by default).
// Of jaxint8_largest k values a row, of which n are chosen.
int64_t Bytes(const std::string& target, int64_t m, int64_t k, int64_t n, int64_t rule, int64_t column_scope,
              int64_t rung, int64_t prologue, int64_t itemsize) {
  Problem p{};
  p.kind = target == "jaxint8_quantize"   ? Problem::Kind::kQuantize
           : target == "jaxint8_product"  ? Problem::Kind::kProduct
           : target == "jaxint8_prologue" ? Problem::Kind::kPrologue
           : target == "jaxint8_largest"  ? Problem::Kind::kLargest
                                          : Problem::Kind::kLinear;
  p.prologue = static_cast<Prologue>(prologue);
  p.type = itemsize == 2 ? Type::kBF16 : Type::kF32;
  p.options.rule = static_cast<Rule>(rule);
  p.options.column_scope = column_scope != 0;
  p.path = static_cast<Path>(rung);
  p.m = m;
  p.k = k;
  p.n = n;
  return WorkspaceBytes(p);
}

}  // namespace
}  // namespace jaxint8::cuda

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of jaxint8; use jaxint8.kernels.";
  module.attr("jaxlib_version") = JAXINT8_JAXLIB_VERSION;
  module.attr("ffi_version") = pybind11::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  module.attr("architectures") = JAXINT8_CUDA_ARCHITECTURES;
  module.def("registrations", &jaxint8::cuda::Registrations, "FFI target name -> capsule.");
  module.def("paths", &jaxint8::cuda::Paths, "Names of the ways to compute a product; the position is `rung`.");
  module.def("workspace_bytes", &jaxint8::cuda::Bytes, "Size of the last result of a call.", pybind11::arg("target"),
             pybind11::arg("m"), pybind11::arg("k"), pybind11::arg("n") = 0, pybind11::arg("rule") = 0,
             pybind11::arg("column_scope") = 0, pybind11::arg("rung") = -1, pybind11::arg("prologue") = 0,
             pybind11::arg("itemsize") = 4);
}
