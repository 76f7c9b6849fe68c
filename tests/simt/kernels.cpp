// The launchers of csrc/cuda, run by csrc/simt, for Python.
#include "cuda/decode_attention.h"
#include "cuda/flash_attention.h"
#include "cuda/vq_nearest.h"
#include "simt/python.h"

namespace py = pybind11;
using namespace t2i::cuda;

namespace {

// Pointers are integers there.
template <class Call, class Pointer, class... Options>
void pointer(py::class_<Call, Options...>& type, const char* name, Pointer Call::*field) {
  type.def_property(
      name, [=](const Call& call) { return reinterpret_cast<uintptr_t>(call.*field); },
      [=](Call& call, uintptr_t value) { call.*field = reinterpret_cast<Pointer>(value); });
}

}  // namespace

PYBIND11_MODULE(MODULE, module) {
  simt::bind(module);
  py::class_<Strides>(module, "Strides")
      .def(py::init([](int64_t batch, int64_t row, int64_t head) {
        return Strides{batch, row, head};
      }));
  py::enum_<Element>(module, "Element").value("fp16", Element::fp16).value("bf16", Element::bf16);

  py::class_<FlashAttention> attention(module, "FlashAttention");
  pointer(attention, "q", &FlashAttention::q);
  pointer(attention, "k", &FlashAttention::k);
  pointer(attention, "v", &FlashAttention::v);
  pointer(attention, "cu_q", &FlashAttention::cu_q);
  pointer(attention, "cu_k", &FlashAttention::cu_k);
  attention.def_readwrite("element", &FlashAttention::element)
      .def_readwrite("q_strides", &FlashAttention::q_strides)
      .def_readwrite("k_strides", &FlashAttention::k_strides)
      .def_readwrite("v_strides", &FlashAttention::v_strides)
      .def_readwrite("sequences", &FlashAttention::sequences)
      .def_readwrite("batch", &FlashAttention::batch)
      .def_readwrite("heads", &FlashAttention::heads)
      .def_readwrite("group", &FlashAttention::group)
      .def_readwrite("length_q", &FlashAttention::length_q)
      .def_readwrite("length_k", &FlashAttention::length_k)
      .def_readwrite("dim", &FlashAttention::dim)
      .def_readwrite("value_dim", &FlashAttention::value_dim)
      .def_readwrite("window_left", &FlashAttention::window_left)
      .def_readwrite("window_right", &FlashAttention::window_right)
      .def_readwrite("softcap", &FlashAttention::softcap)
      .def_readwrite("scale", &FlashAttention::scale);

  py::class_<FlashForward, FlashAttention> forward(module, "FlashForward");
  forward.def(py::init([] { return FlashForward{}; }));
  pointer(forward, "out", &FlashForward::out);
  pointer(forward, "lse", &FlashForward::lse);
  forward.def_readwrite("out_strides", &FlashForward::out_strides);
  module.def("flash_forward", [](const FlashForward& call) { flash_forward(call, nullptr); });

  py::class_<FlashBackward, FlashAttention> backward(module, "FlashBackward");
  backward.def(py::init([] { return FlashBackward{}; }));
  pointer(backward, "dout", &FlashBackward::dout);
  pointer(backward, "out", &FlashBackward::out);
  pointer(backward, "lse", &FlashBackward::lse);
  pointer(backward, "dlse", &FlashBackward::dlse);
  pointer(backward, "log2_sum", &FlashBackward::log2_sum);
  pointer(backward, "minus_delta", &FlashBackward::minus_delta);
  pointer(backward, "dq", &FlashBackward::dq);
  pointer(backward, "dk", &FlashBackward::dk);
  pointer(backward, "dv", &FlashBackward::dv);
  backward.def_readwrite("dout_strides", &FlashBackward::dout_strides)
      .def_readwrite("out_strides", &FlashBackward::out_strides)
      .def_readwrite("dq_strides", &FlashBackward::dq_strides)
      .def_readwrite("dk_strides", &FlashBackward::dk_strides)
      .def_readwrite("dv_strides", &FlashBackward::dv_strides);
  module.def("flash_backward", [](const FlashBackward& call) { flash_backward(call, nullptr); });

  py::enum_<FloatType>(module, "FloatType")
      .value("fp32", FloatType::fp32)
      .value("fp16", FloatType::fp16)
      .value("bf16", FloatType::bf16);
  py::class_<VqNearest> nearest(module, "VqNearest");
  nearest.def(py::init([] { return VqNearest{}; }));
  pointer(nearest, "z", &VqNearest::z);
  pointer(nearest, "codebook", &VqNearest::codebook);
  pointer(nearest, "workspace", &VqNearest::workspace);
  pointer(nearest, "indices", &VqNearest::indices);
  pointer(nearest, "distance", &VqNearest::distance);
  pointer(nearest, "counts", &VqNearest::counts);
  pointer(nearest, "invalid", &VqNearest::invalid);
  nearest.def_readwrite("z_type", &VqNearest::z_type)
      .def_readwrite("codebook_type", &VqNearest::codebook_type)
      .def_readwrite("num_vectors", &VqNearest::num_vectors)
      .def_readwrite("inner", &VqNearest::inner)
      .def_readwrite("outer_stride", &VqNearest::outer_stride)
      .def_readwrite("inner_stride", &VqNearest::inner_stride)
      .def_readwrite("dim_stride", &VqNearest::dim_stride)
      .def_readwrite("code_stride", &VqNearest::code_stride)
      .def_readwrite("code_dim_stride", &VqNearest::code_dim_stride)
      .def_readwrite("num_codes", &VqNearest::num_codes)
      .def_readwrite("dim", &VqNearest::dim)
      .def_readwrite("cosine", &VqNearest::cosine);
  module.def("vq_nearest_workspace", &vq_nearest_workspace);
  module.def("vq_nearest", [](const VqNearest& call) { vq_nearest(call, nullptr); });

  py::class_<DecodeAttention> decode(module, "DecodeAttention");
  decode.def(py::init([] { return DecodeAttention{}; }));
  pointer(decode, "q", &DecodeAttention::q);
  pointer(decode, "k_new", &DecodeAttention::k_new);
  pointer(decode, "v_new", &DecodeAttention::v_new);
  pointer(decode, "k", &DecodeAttention::k);
  pointer(decode, "v", &DecodeAttention::v);
  pointer(decode, "k_scale", &DecodeAttention::k_scale);
  pointer(decode, "v_scale", &DecodeAttention::v_scale);
  pointer(decode, "seqlens", &DecodeAttention::seqlens);
  pointer(decode, "start", &DecodeAttention::start);
  pointer(decode, "cos", &DecodeAttention::cos);
  pointer(decode, "sin", &DecodeAttention::sin);
  pointer(decode, "out", &DecodeAttention::out);
  pointer(decode, "partial", &DecodeAttention::partial);
  pointer(decode, "counters", &DecodeAttention::counters);
  decode.def_readwrite("element", &DecodeAttention::element)
      .def_readwrite("int8", &DecodeAttention::int8)
      .def_readwrite("q_strides", &DecodeAttention::q_strides)
      .def_readwrite("k_new_strides", &DecodeAttention::k_new_strides)
      .def_readwrite("v_new_strides", &DecodeAttention::v_new_strides)
      .def_readwrite("k_strides", &DecodeAttention::k_strides)
      .def_readwrite("v_strides", &DecodeAttention::v_strides)
      .def_readwrite("out_strides", &DecodeAttention::out_strides)
      .def_readwrite("k_scale_strides", &DecodeAttention::k_scale_strides)
      .def_readwrite("v_scale_strides", &DecodeAttention::v_scale_strides)
      .def_readwrite("seqlens_stride", &DecodeAttention::seqlens_stride)
      .def_readwrite("start_stride", &DecodeAttention::start_stride)
      .def_readwrite("cos_stride", &DecodeAttention::cos_stride)
      .def_readwrite("sin_stride", &DecodeAttention::sin_stride)
      .def_readwrite("batch", &DecodeAttention::batch)
      .def_readwrite("tokens", &DecodeAttention::tokens)
      .def_readwrite("heads", &DecodeAttention::heads)
      .def_readwrite("kv_heads", &DecodeAttention::kv_heads)
      .def_readwrite("slots", &DecodeAttention::slots)
      .def_readwrite("dim", &DecodeAttention::dim)
      .def_readwrite("rotary_pairs", &DecodeAttention::rotary_pairs)
      .def_readwrite("positions", &DecodeAttention::positions)
      .def_readwrite("interleaved", &DecodeAttention::interleaved)
      .def_readwrite("window", &DecodeAttention::window)
      .def_readwrite("softcap", &DecodeAttention::softcap)
      .def_readwrite("scale", &DecodeAttention::scale);
  module.def("decode_attention", [](const DecodeAttention& call) { decode_attention(call, nullptr); });
  module.def("decode_attention_partials", &decode_attention_partials);
  module.def("decode_attention_counters", &decode_attention_counters);
}
