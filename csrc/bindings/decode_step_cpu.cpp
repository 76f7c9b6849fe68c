// t2i::decode_step.cpu on torch's stable ABI: all layers of a transformer for a few new tokens of each
// row, in one parallel region; and t2i::draw_tokens.cpu, steps with draws between them. The schemas are
// defined in kernels/t2i_kernels/decode_step/api.py and draw_tokens/api.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "bindings/decode_plan.h"
#include "bindings/draw.h"
#include "bindings/linear.h"
#include "cpu/norm.h"

namespace t2i {
namespace {

using namespace t2i::cpu;

constexpr const char* kStepOp = "decode_step";
constexpr const char* kDrawOp = "draw_tokens";
constexpr int64_t kFewRows = 3;  // every thread normalises them for itself: no barrier

enum class QKNorm { none, head, full };

struct Layer {
  Norm attention_norm, q_norm, k_norm, ffn_norm;
  PackedMatrix qkv, out, gate_up, down;
};

struct Decoder {
  int64_t dim, heads, kv_heads, head_dim, ffn_dim;
  QKNorm qk_norm;
  std::vector<Layer> layers;
  Norm norm;
  PackedMatrix head;

  int64_t groups() const { return heads / kv_heads; }
  int64_t q_width() const { return heads * head_dim; }
  int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
  int64_t ffn_width() const { return round_to_panel(ffn_dim); }

  static int64_t round_to_panel(int64_t x) {
    return (x + kPanelOutputs - 1) / kPanelOutputs * kPanelOutputs;
  }
};

// Takes matrices and norms in the order in which they are used.
struct Reader {
  const char* op;
  WeightType type;
  const uint8_t *weights, *weights_end;
  const float *vectors, *vectors_end;
  bool centered;
  float eps;

  PackedMatrix matrix(int64_t outputs, int64_t inputs) {
    const PackedMatrix matrix{type, outputs, inputs, weights};
    const int64_t bytes = matrix.panels() * matrix.panel_bytes();
    check(op, bytes <= weights_end - weights, "weights end before a matrix [", outputs, ", ", inputs,
          "]: ", bytes, " bytes are needed, ", weights_end - weights, " are left");
    weights += bytes;
    return matrix;
  }

  Norm norm(int64_t channels) {
    const int64_t count = centered ? 2 * channels : channels;
    check(op, count <= vectors_end - vectors, "vectors end before a norm of ", channels, " channels");
    const Norm norm{vectors, centered ? vectors + channels : nullptr, eps, centered};
    vectors += count;
    return norm;
  }
};

Decoder read_decoder(Reader reader, int64_t layers, int64_t outputs, Decoder decoder) {
  const int64_t dim = decoder.dim, q_norm = decoder.qk_norm == QKNorm::full
                                                ? decoder.q_width() : decoder.head_dim;
  const int64_t k_norm = decoder.qk_norm == QKNorm::full
                             ? decoder.kv_heads * decoder.head_dim : decoder.head_dim;
  for (int64_t i = 0; i < layers; ++i) {
    Layer layer;
    layer.attention_norm = reader.norm(dim);
    if (decoder.qk_norm != QKNorm::none) {
      layer.q_norm = reader.norm(q_norm);
      layer.k_norm = reader.norm(k_norm);
    }
    layer.ffn_norm = reader.norm(dim);
    layer.qkv = reader.matrix(decoder.qkv_width(), dim);
    layer.out = reader.matrix(dim, decoder.q_width());
    layer.gate_up = reader.matrix(2 * decoder.ffn_width(), dim);
    layer.down = reader.matrix(dim, decoder.ffn_dim);
    decoder.layers.push_back(layer);
  }
  decoder.norm = reader.norm(dim);
  decoder.head = reader.matrix(outputs, dim);
  check(reader.op, reader.weights == reader.weights_end && reader.vectors == reader.vectors_end,
        "weights or vectors go on behind the last of the shape: ",
        reader.weights_end - reader.weights, " bytes and ", reader.vectors_end - reader.vectors,
        " numbers");
  return decoder;
}

// ---- The step ----------------------------------------------------------------------------------

// Memory for all of it, and for further steps that find the seqlens raised by the tokens of the last.
class Step {
 public:
  Step(const Decoder& decoder, const DecodeStep& attention, int64_t batch, int64_t layer_stride,
       int64_t scale_stride, int64_t threads, int64_t steps)
      : decoder_(decoder), attention_(attention), batch_(batch), rows_(batch * attention.tokens),
        layer_stride_(layer_stride), scale_stride_(scale_stride), threads_(threads),
        linear_(linear_kernels()), decode_(decode_kernels()), norm_row_(norm_row()) {
    DecodeStep last = attention;
    std::vector<int32_t> lengths(attention.seqlens, attention.seqlens + batch);
    for (int32_t& length : lengths) length += int32_t((steps - 1) * attention.tokens);
    last.seqlens = lengths.data();
    const DecodePlan longest = plan_decode(last, batch);
    widest_ = std::max({decoder.dim, decoder.q_width(), decoder.ffn_width()});
    quantized_ = decoder.head.quantized();
    // Of a thread: sums, or attention's workspace; and a few prepared rows.
    prepared_size_ = std::min(rows_, kFewRows) * widest_;
    const int64_t quantized = quantized_ ? quantized_size(std::min(rows_, kFewRows), widest_) : 0;
    attention_size_ = decode_.workspace(attention_);
    thread_size_ = round_up(std::max(kLinearWorkspace, attention_size_)) +
                   round_up(prepared_size_) + round_up(quantized);
    const int64_t shared_rows = rows_ > kFewRows ? rows_ : 0;
    const int64_t sizes[] = {rows_ * decoder.dim,
                             rows_ * decoder.qkv_width(),
                             rows_ * decoder.q_width(),
                             rows_ * decoder.ffn_width(),
                             longest.num_parts() * partial_size(attention_),
                             shared_rows * widest_,
                             quantized_ ? quantized_size(shared_rows, widest_) : 0,
                             threads * thread_size_};
    int64_t total = 0;
    for (int64_t size : sizes) total += round_up(size);
    memory_ = allocate(total);
    float* next = memory_.get();
    float* partials;
    float** places[] = {&residual_, &qkv_, &attended_, &ffn_, &partials, &shared_,
                        &shared_quantized_, &threads_space_};
    for (int i = 0; i < 8; ++i) {
      *places[i] = next;
      next += round_up(sizes[i]);
    }
    partials_ = partials_in(attention_, longest, partials);
    const int64_t width = decoder.qkv_width(), tokens = attention_.tokens, dim = decoder.head_dim;
    const auto in_qkv = [&](int64_t head) {
      return Tokens{qkv_ + head * dim, tokens * width, width, dim};
    };
    attention_.q = in_qkv(0);
    attention_.k_new = in_qkv(decoder.heads);
    attention_.v_new = in_qkv(decoder.heads + decoder.kv_heads);
    attention_.out = {attended_, tokens * decoder.q_width(), decoder.q_width(), dim};
    next_task_ = std::vector<std::atomic<int64_t>>(decoder.layers.size());
  }

  float* residual() { return residual_; }

  // logits: [batch, last, outputs], of the last tokens of each row.
  void run(float* logits, int64_t last) {
    plan_ = plan_decode(attention_, batch_);
    for (std::atomic<int64_t>& next : next_task_) next = 0;
    run_team(threads_, [&](const Member& member) {
      for (size_t i = 0; i < decoder_.layers.size(); ++i) {
        attend(member, decoder_.layers[i], int64_t(i));
        feed_forward(member, decoder_.layers[i]);
      }
      score(member, logits, last);
    });
  }

 private:
  float* space(const Member& member) { return threads_space_ + member.index * thread_size_; }

  // Rows as a product takes them: normalised where there is a norm, quantised where weights are. Few
  // are prepared by every thread for itself; many by all for all.
  template <typename Row>
  LinearInputs prepare(const Member& member, const Row& row_at, int64_t rows, int64_t inputs,
                       const Norm* norm) {
    LinearInputs in{rows, row_at(0), row_at(1) - row_at(0), {}};
    if (!norm && !quantized_) return in;
    const bool few = rows <= kFewRows;
    float* mine = space(member) + round_up(std::max(kLinearWorkspace, attention_size_));
    float* prepared = few ? mine : shared_;
    if (quantized_) {
      in.quantized = quantized_in(few ? mine + round_up(prepared_size_) : shared_quantized_, rows,
                                  inputs);
    }
    const auto [begin, end] = few ? std::pair<int64_t, int64_t>{0, rows} : member.share(rows);
    for (int64_t row = begin; row < end; ++row) {
      const float* from = row_at(row);
      if (norm) {
        norm_row_(from, inputs, *norm, prepared + row * inputs);
        from = prepared + row * inputs;
      }
      if (quantized_) {
        linear_.quantize(from, inputs, quantized_row(in.quantized, row, inputs));
      }
    }
    if (norm) {
      in.x = prepared;
      in.stride = inputs;
    }
    if (!few) member.wait();
    return in;
  }

  void multiply(const Member& member, const PackedMatrix& matrix, const LinearInputs& in,
                const LinearOutputs& out) {
    const int64_t panels = matrix.panels() / (out.epilogue == Epilogue::swiglu ? 2 : 1);
    const auto [begin, end] = member.share(panels);
    linear_.multiply(matrix, in, begin, end, out, space(member));
  }

  void attend(const Member& member, const Layer& layer, int64_t index) {
    const int64_t dim = decoder_.dim, width = decoder_.qkv_width();
    const auto residual = [&](int64_t row) { return residual_ + row * dim; };
    const LinearInputs in = prepare(member, residual, rows_, dim, &layer.attention_norm);
    multiply(member, layer.qkv, in, {qkv_, width, Epilogue::store});
    member.wait();
    if (decoder_.qk_norm != QKNorm::none) {
      const auto [begin, end] = member.share(rows_);
      for (int64_t row = begin; row < end; ++row) normalise_heads(layer, qkv_ + row * width);
      member.wait();
    }
    attend_to_cache(member, index);
    member.wait();
    const int64_t q_width = decoder_.q_width();
    const auto attended = [&](int64_t row) { return attended_ + row * q_width; };
    multiply(member, layer.out, prepare(member, attended, rows_, q_width, nullptr),
             {residual_, dim, Epilogue::add});
    member.wait();
  }

  void normalise_heads(const Layer& layer, float* qkv) {
    const bool full = decoder_.qk_norm == QKNorm::full;
    for (int64_t which = 0; which < 2; ++which) {
      const int64_t heads = which ? decoder_.kv_heads : decoder_.heads;
      const Norm& norm = which ? layer.k_norm : layer.q_norm;
      float* x = qkv + (which ? decoder_.q_width() : 0);
      const int64_t channels = (full ? heads : 1) * decoder_.head_dim;
      for (int64_t i = 0; i < (full ? 1 : heads); ++i) {
        norm_row_(x + i * channels, channels, norm, x + i * channels);
      }
    }
  }

  void attend_to_cache(const Member& member, int64_t index) {
    DecodeStep step = attention_;
    const int64_t bytes = step.cache_type == CacheType::f32 ? 4
                          : step.cache_type == CacheType::int8 ? 1 : 2;
    for (Tokens* cache : {&step.k, &step.v}) {
      cache->data = static_cast<char*>(cache->data) + index * layer_stride_ * bytes;
    }
    for (Scales* scales : {&step.k_scale, &step.v_scale}) {
      if (scales->data) scales->data += index * scale_stride_;
    }
    run_decode(member, decode_, step, batch_, plan_, partials_, next_task_[index],
               space(member));
  }

  void feed_forward(const Member& member, const Layer& layer) {
    const int64_t dim = decoder_.dim, width = decoder_.ffn_width();
    const auto residual = [&](int64_t row) { return residual_ + row * dim; };
    multiply(member, layer.gate_up, prepare(member, residual, rows_, dim, &layer.ffn_norm),
             {ffn_, width, Epilogue::swiglu});
    member.wait();
    const auto hidden = [&](int64_t row) { return ffn_ + row * width; };
    multiply(member, layer.down, prepare(member, hidden, rows_, decoder_.ffn_dim, nullptr),
             {residual_, dim, Epilogue::add});
    member.wait();
  }

  void score(const Member& member, float* logits, int64_t last) {
    const int64_t dim = decoder_.dim, skipped = attention_.tokens - last;
    const auto residual = [&](int64_t row) {
      return residual_ + (row + (row / last + 1) * skipped) * dim;
    };
    multiply(member, decoder_.head, prepare(member, residual, batch_ * last, dim, &decoder_.norm),
             {logits, decoder_.head.outputs, Epilogue::store});
  }

  const Decoder& decoder_;
  DecodeStep attention_;
  DecodePlan plan_;
  int64_t batch_, rows_, layer_stride_, scale_stride_, threads_;
  const LinearKernels& linear_;
  const DecodeKernels& decode_;
  NormRow norm_row_;
  bool quantized_;
  int64_t widest_, prepared_size_, attention_size_, thread_size_;
  Floats memory_;
  float *residual_, *qkv_, *attended_, *ffn_, *shared_, *shared_quantized_, *threads_space_;
  std::vector<DecodePartial> partials_;
  std::vector<std::atomic<int64_t>> next_task_;
};

QKNorm qk_norm_named(const char* op, const std::string& name) {
  if (name == "none") return QKNorm::none;
  if (name == "head") return QKNorm::head;
  check(op, name == "full", "qk_norm must be none, head or full, got ", name);
  return QKNorm::full;
}

// A decoder and its cache, whose memory the arguments of the call keep, but for what is copied.
struct Model {
  Decoder decoder{};
  DecodeStep step{};  // without tokens
  int64_t batch, slots, layer_stride, scale_stride = 0, positions = 0;
  Tensor seqlens, start;
  std::optional<Tensor> cos, sin;

  Model(const char* op, int64_t dim, const Tensor& weights, const Tensor& vectors, const std::string& type,
        int64_t heads, int64_t ffn_dim, int64_t outputs, const std::string& norm, double norm_eps,
        const std::string& qk_norm, const Tensor& k_cache, const Tensor& v_cache,
        const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
        const Tensor& lengths, const Tensor& starts, const std::optional<Tensor>& rotary_cos,
        const std::optional<Tensor>& rotary_sin, bool rotary_interleaved,
        bool positions_from_start)
      : seqlens(torch::stable::contiguous(lengths)), start(torch::stable::contiguous(starts)) {
    for (const Tensor* cache : {&k_cache, &v_cache}) {
      check(op, cache->is_cpu() && cache->dim() == 5 && cache->stride(4) == 1,
            "cache must be [layers, batch, slots, heads, head_dim] on the CPU, its rows contiguous");
      check(op, shape(*cache) == shape(k_cache) &&
                cache->scalar_type() == k_cache.scalar_type(),
            "cache must be k and v alike, got ", shape(k_cache), " and ", shape(v_cache));
      check(op, cache->stride(0) == k_cache.stride(0),
            "the layers of cache.k and cache.v must be equally far apart, they are ",
            k_cache.stride(0), " and ", v_cache.stride(0), " numbers");
    }
    batch = k_cache.size(1);
    const bool int8 = k_cache.scalar_type() == ScalarType::Char;
    for (const std::optional<Tensor>* scale : {&k_scale, &v_scale}) {
      check(op, scale->has_value() == int8, "an int8 cache has scales, another has none");
      if (!int8) continue;
      const Tensor& s = **scale;
      bool fits = s.is_cpu() && s.dim() == 4 && s.stride(0) == (*k_scale).stride(0);
      for (int64_t i = 0; fits && i < 4; ++i) fits = s.size(i) == k_cache.size(i);
      check(op, fits, "scales of a cache ", shape(k_cache), " must be alike and have its first four "
            "dimensions, got ", shape(s));
    }
    check_places(op, batch, k_cache.size(4), seqlens, start, rotary_cos, rotary_sin);
    check(op, weights.is_cpu() && weights.is_contiguous() && vectors.is_cpu() &&
              vectors.is_contiguous() && vectors.scalar_type() == ScalarType::Float,
          "weights and vectors must be contiguous on the CPU");
    slots = k_cache.size(2);
    layer_stride = k_cache.stride(0);
    const int64_t kv_heads = k_cache.size(3);
    check(op, kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "heads, ", heads,
          ", is no multiple of the cache's ", kv_heads);
    check(op, dim > 0 && ffn_dim > 0 && outputs > 0 && k_cache.size(4) > 0,
          "dim, ffn_dim, outputs and head_dim must be above 0, got ", dim, ", ", ffn_dim, ", ",
          outputs, " and ", k_cache.size(4));

    decoder.dim = dim;
    decoder.heads = heads;
    decoder.kv_heads = kv_heads;
    decoder.head_dim = k_cache.size(4);
    decoder.ffn_dim = ffn_dim;
    decoder.qk_norm = qk_norm_named(op, qk_norm);
    const uint8_t* bytes = weights.const_data_ptr<uint8_t>();
    const float* floats = vectors.const_data_ptr<float>();
    const Reader reader{op, weight_type(op, type), bytes, bytes + weights.numel(), floats,
                        floats + vectors.numel(), norm == "layernorm", float(norm_eps)};
    decoder = read_decoder(reader, k_cache.size(0), outputs, decoder);

    step.type = FloatType::f32;
    step.cache_type = cache_type(op, k_cache);
    step.kv_heads = kv_heads;
    step.groups = decoder.groups();
    step.dim = decoder.head_dim;
    for (const auto& [to, cache] : {std::pair{&step.k, &k_cache}, std::pair{&step.v, &v_cache}}) {
      *to = {cache->mutable_data_ptr(), cache->stride(1), cache->stride(2), cache->stride(3)};
    }
    for (const auto& [to, scale] :
         {std::pair{&step.k_scale, &k_scale}, std::pair{&step.v_scale, &v_scale}}) {
      if (!*scale) continue;
      const Tensor& tensor = **scale;
      *to = {tensor.mutable_data_ptr<float>(), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
      scale_stride = tensor.stride(0);
    }
    step.seqlens = seqlens.const_data_ptr<int32_t>();
    step.start = start.const_data_ptr<int32_t>();
    if (rotary_cos) {
      cos = torch::stable::contiguous(*rotary_cos);
      sin = torch::stable::contiguous(*rotary_sin);
      step.cos = cos->const_data_ptr<float>();
      step.sin = sin->const_data_ptr<float>();
      positions = cos->size(0);
      step.pairs = cos->size(1);
    }
    step.interleaved = rotary_interleaved;
    step.positions_from_start = positions_from_start;
    step.window = int64_t(1) << 40;  // all
    step.scale = float(1 / std::sqrt(double(step.dim)));
  }

  // Raises where so many tokens more have no slots or rotary positions.
  void check_room(const char* op, int64_t tokens) const {
    DecodeStep all = step;
    all.tokens = tokens;
    check_slots(op, all, batch, slots, cos ? &positions : nullptr);
  }
};

Tensor decode_step(Tensor x, Tensor weights, Tensor vectors, std::string type, int64_t heads,
                   int64_t ffn_dim, int64_t outputs, std::string norm, double norm_eps,
                   std::string qk_norm, Tensor k_cache, Tensor v_cache,
                   std::optional<Tensor> k_scale, std::optional<Tensor> v_scale, Tensor seqlens,
                   Tensor start, std::optional<Tensor> rotary_cos,
                   std::optional<Tensor> rotary_sin, bool rotary_interleaved,
                   bool positions_from_start, int64_t last) {
  check(kStepOp, x.is_cpu() && x.dim() == 3 && x.scalar_type() == ScalarType::Float,
        "x must be float32 [batch, tokens, dim] on the CPU");
  const int64_t batch = x.size(0), tokens = x.size(1);
  check(kStepOp, last >= 1 && last <= tokens, "last must be 1 to ", tokens, ", got ", last);
  Model model(kStepOp, x.size(2), weights, vectors, type, heads, ffn_dim, outputs, norm, norm_eps, qk_norm,
              k_cache, v_cache, k_scale, v_scale, seqlens, start, rotary_cos, rotary_sin,
              rotary_interleaved, positions_from_start);
  check(kStepOp, model.batch == batch, "cache has ", model.batch, " rows, x has ", batch);
  model.check_room(kStepOp, tokens);
  model.step.tokens = tokens;

  Tensor logits = torch::stable::empty({batch, last, outputs}, ScalarType::Float);
  if (batch == 0) return logits;
  const Tensor in = torch::stable::contiguous(x);
  Step run(model.decoder, model.step, batch, model.layer_stride, model.scale_stride,
           torch::stable::get_num_threads(), 1);
  std::memcpy(run.residual(), in.const_data_ptr<float>(), size_t(in.numel()) * sizeof(float));
  run.run(logits.mutable_data_ptr<float>(), last);
  return logits;
}

Tensor draw_tokens(Tensor codes, Tensor embedding, int64_t count, Tensor seeds, Tensor positions,
                   std::optional<Tensor> guidance, double temperature, int64_t top_k, double top_p,
                   Tensor weights, Tensor vectors, std::string type, int64_t heads,
                   int64_t ffn_dim, int64_t outputs, std::string norm, double norm_eps,
                   std::string qk_norm, Tensor k_cache, Tensor v_cache,
                   std::optional<Tensor> k_scale, std::optional<Tensor> v_scale, Tensor seqlens,
                   Tensor start, std::optional<Tensor> rotary_cos,
                   std::optional<Tensor> rotary_sin, bool rotary_interleaved,
                   bool positions_from_start) {
  check(kDrawOp, embedding.is_cpu() && embedding.dim() == 2 && embedding.is_contiguous() &&
            embedding.scalar_type() == ScalarType::Float && embedding.size(0) == outputs,
        "embedding must be float32 [", outputs, ", dim], contiguous, on the CPU");
  const int64_t dim = embedding.size(1);
  Model model(kDrawOp, dim, weights, vectors, type, heads, ffn_dim, outputs, norm, norm_eps, qk_norm,
              k_cache, v_cache, k_scale, v_scale, seqlens, start, rotary_cos, rotary_sin,
              rotary_interleaved, positions_from_start);
  const DrawCodes draw = DrawCodes::bind(kDrawOp, seeds, positions, guidance, temperature, top_k,
                                         top_p, count);
  const int64_t images = draw.images(), rows = images * (guidance ? 2 : 1);
  check(kDrawOp, codes.numel() == images && model.batch == rows, "for ", images, " seeds codes have ",
        codes.numel(), " numbers and the cache ", model.batch, " rows");
  const Tensor last = torch::stable::contiguous(codes);
  for (int64_t i = 0; i < images; ++i) {
    const int64_t code = last.const_data_ptr<int64_t>()[i];
    check(kDrawOp, code >= 0 && code < outputs, "codes must be 0 to ", outputs - 1, ", got ", code);
  }
  model.check_room(kDrawOp, count);

  Tensor out = torch::stable::empty({images, count}, ScalarType::Long);
  if (images == 0) return out;
  int64_t* drawn = out.mutable_data_ptr<int64_t>();
  const float* table = embedding.const_data_ptr<float>();
  const Floats logits = allocate(rows * outputs);
  std::vector<int32_t> lengths(model.step.seqlens, model.step.seqlens + rows);
  model.step.seqlens = lengths.data();
  model.step.tokens = 1;
  Step run(model.decoder, model.step, rows, model.layer_stride, model.scale_stride,
           torch::stable::get_num_threads(), count);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t image = row % images;
      const int64_t code = i ? drawn[image * count + i - 1] : last.const_data_ptr<int64_t>()[image];
      std::memcpy(run.residual() + row * dim, table + code * dim, size_t(dim) * sizeof(float));
    }
    run.run(logits.get(), 1);
    draw.run(kDrawOp, logits.get(), 1, outputs, i, drawn);
    for (int32_t& length : lengths) ++length;
  }
  return out;
}

}  // namespace
}  // namespace t2i

STABLE_TORCH_LIBRARY_IMPL(t2i, CPU, m) {
  m.impl("decode_step.cpu", TORCH_BOX(&t2i::decode_step));
  m.impl("draw_tokens.cpu", TORCH_BOX(&t2i::draw_tokens));
}
