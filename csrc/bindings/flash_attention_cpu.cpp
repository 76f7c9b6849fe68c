// t2i::flash_attention.cpu and its backward on torch's stable ABI. The schemas are defined in
// kernels/t2i_kernels/flash_attention/api.py.
#include "cpu/flash_attention.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bindings/common.h"

namespace t2i {
namespace {

using namespace t2i::cpu;

constexpr const char* kOp = "flash_attention";
constexpr int64_t kUnbounded = int64_t(1) << 40;  // of a window
// Where there are fewer tasks, keys are cut as well. That must not depend on the number of threads:
// sums are in the order of the cuts.
constexpr int64_t kTasks = 32;
constexpr int64_t kSplitKeys = 512;  // keys of a task at least, where keys are cut
constexpr int64_t kSplitRows = 128;  // rows of such a task
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kTaskBytes = 1 << 20;  // of the rows that a task keeps in the cache
constexpr int64_t kGradChunks = 4;   // buffers for dq at most

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The rows of sequence i of a tensor [batch, length, heads, dim] or, from first on, of a packed
// one [total, heads, dim].
Rows rows_of(const Tensor& tensor, bool packed, int64_t i, int64_t first) {
  void* data = const_cast<void*>(tensor.const_data_ptr());
  if (packed) return {data, first * tensor.stride(0), tensor.stride(0), tensor.stride(1)};
  return {data, i * tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

std::vector<int64_t> sequence_ends(const Tensor& cu_seqlens, const char* name, int64_t total) {
  check(kOp, cu_seqlens.is_cpu() && cu_seqlens.scalar_type() == ScalarType::Int, name,
        " must be int32 on the CPU");
  check(kOp, cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, name,
        " must be [sequences + 1], got ", shape(cu_seqlens));
  const Tensor values = torch::stable::contiguous(cu_seqlens);
  const int32_t* data = values.const_data_ptr<int32_t>();
  const std::vector<int64_t> ends(data, data + values.size(0));
  if (ends.front() == 0 && ends.back() == total && std::is_sorted(ends.begin(), ends.end())) {
    return ends;
  }
  std::ostringstream text;
  for (size_t i = 0; i < ends.size(); ++i) text << (i ? ", " : "") << ends[i];
  check(kOp, false, name, " must rise from 0 to ", total, ", the number of rows, got [",
        text.str(), "]");
  return {};
}

// A call as the kernels want it. Keeps the tensors alive.
struct Call {
  Tensor q, k, v, out, logsumexp;
  bool packed;
  Attention attention;
  std::vector<Sequence> sequences;
  std::vector<int64_t> q_first, k_first;

  Call(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
       const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
       bool causal, int64_t window_left, int64_t window_right, double softcap, double scale)
      : q(with_contiguous_rows(q_in)),
        k(with_contiguous_rows(k_in)),
        v(with_contiguous_rows(v_in)),
        packed(cu_seqlens_q.has_value()) {
    const int64_t dims = packed ? 3 : 4;
    check(kOp, q.dim() == dims && k.dim() == dims && v.dim() == dims, "q, k and v must have ",
          dims, " dimensions, got ", shape(q), ", ", shape(k), ", ", shape(v));
    check(kOp, cu_seqlens_k.has_value() == packed, "cu_seqlens_q and cu_seqlens_k go together");
    const FloatType type = float_type(kOp, q, "q");
    check(kOp, float_type(kOp, k, "k") == type && float_type(kOp, v, "v") == type,
          "q, k and v must have one type");
    const int64_t heads = q.size(dims - 2), kv_heads = k.size(dims - 2);
    bool fits = k.size(dims - 1) == q.size(dims - 1) && (packed || k.size(0) == q.size(0));
    for (int64_t i = 0; i + 1 < dims; ++i) fits = fits && v.size(i) == k.size(i);
    fits = fits && (kv_heads > 0 ? heads % kv_heads == 0 : heads == 0);
    check(kOp, fits, "q ", shape(q), ", k ", shape(k), " and v ", shape(v), " do not fit");
    check(kOp, softcap == 0 || softcap >= 1e-20, "softcap must be 0 or at least 1e-20, got ",
          softcap);
    check(kOp, window_left >= -1 && window_right >= -1, "window must be at least -1");

    attention.type = type;
    attention.kv_heads = kv_heads;
    attention.groups = kv_heads > 0 ? heads / kv_heads : 1;
    attention.dim = q.size(dims - 1);
    attention.v_dim = v.size(dims - 1);
    attention.left = window_left < 0 ? kUnbounded : std::min(window_left, kUnbounded);
    attention.right = window_right < 0 ? kUnbounded : std::min(window_right, kUnbounded);
    if (causal) attention.right = 0;
    attention.softcap = float(softcap);
    attention.scale = float(scale);

    if (packed) {
      q_first = sequence_ends(*cu_seqlens_q, "cu_seqlens_q", q.size(0));
      k_first = sequence_ends(*cu_seqlens_k, "cu_seqlens_k", k.size(0));
      check(kOp, q_first.size() == k_first.size(),
            "cu_seqlens_q and cu_seqlens_k must be of one length");
    }
  }

  // The sequences, once out and logsumexp are there.
  void bind(Tensor out_tensor, Tensor logsumexp_tensor) {
    out = with_contiguous_rows(out_tensor);
    logsumexp = torch::stable::contiguous(logsumexp_tensor);
    float* statistics = const_cast<float*>(logsumexp.const_data_ptr<float>());
    const int64_t count = packed ? int64_t(q_first.size()) - 1 : q.size(0);
    for (int64_t i = 0; i < count; ++i) {
      Sequence s;
      const int64_t q_from = packed ? q_first[i] : 0, k_from = packed ? k_first[i] : 0;
      s.q_length = packed ? q_first[i + 1] - q_from : q.size(1);
      s.k_length = packed ? k_first[i + 1] - k_from : k.size(1);
      s.q = rows_of(q, packed, i, q_from);
      s.k = rows_of(k, packed, i, k_from);
      s.v = rows_of(v, packed, i, k_from);
      s.out = rows_of(out, packed, i, q_from);
      s.logsumexp = statistics + logsumexp_offset(i);
      s.logsumexp_stride = packed ? q.size(0) : q.size(1);
      sequences.push_back(s);
    }
  }

  int64_t logsumexp_offset(int64_t i) const {
    return packed ? q_first[i] : i * attention.kv_heads * attention.groups * q.size(1);
  }
};

struct ForwardTask {
  int64_t sequence, kv_head, row, rows, key, key_end, partial;  // partial: -1 for none
};

// Rows whose keys are cut: where their partials begin.
struct Cut {
  int64_t sequence, kv_head, row, rows, first, count;
};

// Rows of a task at most: the more, the less often keys and values are read.
int64_t task_rows(const Attention& a, const std::vector<Sequence>& sequences) {
  int64_t rows = 0;
  for (const Sequence& s : sequences) rows += a.kv_heads * a.groups * s.q_length;
  const int64_t enough = rows / (kTasksPerThread * torch::stable::get_num_threads());
  const int64_t fitting = kTaskBytes / (4 * std::max<int64_t>(1, a.dim + a.v_dim));
  return divide_up(std::clamp<int64_t>(enough, kSplitRows, std::max(fitting, kSplitRows)), kRows) *
         kRows;
}

std::tuple<Tensor, Tensor> flash_attention(Tensor q, Tensor k, Tensor v,
                                           std::optional<Tensor> cu_seqlens_q,
                                           std::optional<Tensor> cu_seqlens_k, bool causal,
                                           int64_t window_left, int64_t window_right,
                                           double softcap, double scale) {
  Call call(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_left, window_right, softcap,
            scale);
  const Attention& a = call.attention;
  std::vector<int64_t> out_shape, statistics_shape;
  for (int64_t i = 0; i < q.dim(); ++i) out_shape.push_back(q.size(i));
  out_shape.back() = a.v_dim;
  if (!call.packed) statistics_shape.push_back(q.size(0));
  statistics_shape.push_back(q.size(q.dim() - 2));
  statistics_shape.push_back(q.size(q.dim() - 3));
  Tensor out = torch::stable::empty(out_shape, q.scalar_type());
  Tensor logsumexp = torch::stable::empty(statistics_shape, ScalarType::Float);
  call.bind(out, logsumexp);

  int64_t blocks = 0;
  for (const Sequence& s : call.sequences) {
    blocks += a.kv_heads * divide_up(a.groups * s.q_length, kSplitRows);
  }
  const int64_t most_rows = task_rows(a, call.sequences);
  std::vector<ForwardTask> tasks;
  std::vector<Cut> cuts;
  int64_t partials = 0;
  for (int64_t i = 0; i < int64_t(call.sequences.size()); ++i) {
    const Sequence& s = call.sequences[i];
    const int64_t rows = a.groups * s.q_length;
    const int64_t splits =
        blocks ? std::clamp<int64_t>(s.k_length / kSplitKeys, 1, divide_up(kTasks, blocks)) : 1;
    const int64_t keys = divide_up(s.k_length, splits);
    // As even as they can be.
    const int64_t count = divide_up(rows, splits == 1 ? most_rows : kSplitRows);
    const int64_t step = rows ? divide_up(divide_up(rows, count), kRows) * kRows : 1;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      // The last rows first: with a causal mask they see most.
      for (int64_t row = (divide_up(rows, step) - 1) * step; row >= 0; row -= step) {
        const int64_t here = std::min(step, rows - row);
        if (splits == 1) {
          tasks.push_back({i, head, row, here, 0, s.k_length, -1});
          continue;
        }
        cuts.push_back({i, head, row, here, partials, splits});
        for (int64_t part = 0; part < splits; ++part) {
          const int64_t end = std::min(s.k_length, (part + 1) * keys);
          tasks.push_back({i, head, row, here, std::min(part * keys, end), end, partials++});
        }
      }
    }
  }

  const AttentionKernels& kernels = attention_kernels();
  const Floats buffer = allocate(partials * kSplitRows * (a.v_dim + 1));
  std::vector<Partial> partial(partials);
  for (int64_t i = 0; i < partials; ++i) {
    partial[i].out = buffer.get() + i * kSplitRows * (a.v_dim + 1);
    partial[i].logsumexp = partial[i].out + kSplitRows * a.v_dim;
  }
  run_tasks(int64_t(tasks.size()), kernels.forward_workspace(a, most_rows),
            [&](int64_t i, float* space) {
              const ForwardTask& task = tasks[i];
              kernels.forward(a, call.sequences[task.sequence], task.kv_head, task.row, task.rows,
                              task.key, task.key_end,
                              task.partial < 0 ? nullptr : &partial[task.partial], space);
            });
  run_tasks(int64_t(cuts.size()), a.v_dim, [&](int64_t i, float* space) {
    const Cut& cut = cuts[i];
    kernels.combine(a, call.sequences[cut.sequence], cut.kv_head, cut.row, cut.rows,
                    &partial[cut.first], cut.count, space);
  });
  return {out, logsumexp};
}

struct BackwardTask {
  int64_t sequence, kv_head, key, key_end;
  float* dq;  // null: not cut
};

std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(
    Tensor dout, std::optional<Tensor> dlogsumexp, Tensor q, Tensor k, Tensor v, Tensor out,
    Tensor logsumexp, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
    bool causal, int64_t window_left, int64_t window_right, double softcap, double scale) {
  Call call(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_left, window_right, softcap,
            scale);
  call.bind(out, logsumexp);
  const Attention& a = call.attention;
  const auto like = [](const Tensor& tensor) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
    return torch::stable::empty(sizes, tensor.scalar_type());
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  const Tensor dout_rows = with_contiguous_rows(dout);
  check(kOp, float_type(kOp, dout_rows, "dout") == a.type, "dout must have the type of q");
  std::optional<Tensor> dlse;
  if (dlogsumexp) dlse = torch::stable::contiguous(*dlogsumexp);

  std::vector<SequenceGradients> gradients;
  std::vector<BackwardTask> tasks;
  std::vector<int64_t> chunks, buffers;  // of each sequence: how many, and where they begin
  int64_t buffered = 0, longest = 0;
  const int64_t heads = std::max<int64_t>(1, a.kv_heads * int64_t(call.sequences.size()));
  for (int64_t i = 0; i < int64_t(call.sequences.size()); ++i) {
    const Sequence& s = call.sequences[i];
    const int64_t q_from = call.packed ? call.q_first[i] : 0;
    const int64_t k_from = call.packed ? call.k_first[i] : 0;
    gradients.push_back({rows_of(dout_rows, call.packed, i, q_from),
                         rows_of(dq, call.packed, i, q_from), rows_of(dk, call.packed, i, k_from),
                         rows_of(dv, call.packed, i, k_from),
                         dlse ? dlse->const_data_ptr<float>() + call.logsumexp_offset(i) : nullptr});
    const int64_t most = std::min(kGradChunks, divide_up(kTasks, heads));
    const int64_t count = std::clamp<int64_t>(s.k_length / kSplitKeys, 1, most);
    chunks.push_back(count);
    buffers.push_back(buffered);
    longest = std::max(longest, divide_up(s.k_length, count));
    if (count > 1) buffered += count * a.kv_heads * a.groups * s.q_length * a.dim;
  }
  const Floats buffer = allocate(buffered);
  for (int64_t i = 0; i < int64_t(call.sequences.size()); ++i) {
    const Sequence& s = call.sequences[i];
    const int64_t keys = divide_up(s.k_length, chunks[i]);
    const int64_t size = a.groups * s.q_length * a.dim;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      for (int64_t part = 0; part < chunks[i]; ++part) {
        const int64_t end = std::min(s.k_length, (part + 1) * keys);
        float* space = buffer.get() + buffers[i] + (part * a.kv_heads + head) * size;
        tasks.push_back(
            {i, head, std::min(part * keys, end), end, chunks[i] > 1 ? space : nullptr});
      }
    }
  }

  const AttentionKernels& kernels = attention_kernels();
  run_tasks(int64_t(tasks.size()), kernels.backward_workspace(a, longest),
            [&](int64_t i, float* space) {
              const BackwardTask& task = tasks[i];
              kernels.backward(a, call.sequences[task.sequence], gradients[task.sequence],
                               task.kv_head, task.key, task.key_end, task.dq, space);
            });

  std::vector<Cut> cuts;
  for (int64_t i = 0; i < int64_t(call.sequences.size()); ++i) {
    if (chunks[i] == 1) continue;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const int64_t rows = a.groups * call.sequences[i].q_length;
      for (int64_t row = 0; row < rows; row += kSplitRows) {
        cuts.push_back({i, head, row, std::min(kSplitRows, rows - row), buffers[i], chunks[i]});
      }
    }
  }
  run_tasks(int64_t(cuts.size()), a.dim, [&](int64_t i, float* space) {
    const Cut& cut = cuts[i];
    const int64_t rows = a.groups * call.sequences[cut.sequence].q_length;
    kernels.sum_dq(a, call.sequences[cut.sequence], gradients[cut.sequence], cut.kv_head, cut.row,
                   cut.row + cut.rows,
                   buffer.get() + cut.first + cut.kv_head * rows * a.dim, cut.count,
                   a.kv_heads * rows * a.dim, space);
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace t2i

STABLE_TORCH_LIBRARY_IMPL(t2i, CPU, m) {
  m.impl("flash_attention.cpu", TORCH_BOX(&t2i::flash_attention));
  m.impl("flash_attention_backward.cpu", TORCH_BOX(&t2i::flash_attention_backward));
}
