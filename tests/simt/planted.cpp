// The tests' kernels for Python. Addresses are integers there.
#include "planted.h"

#include "simt/python.h"

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(MODULE, module) {
  simt::bind(module);
  module.def("planted_names", &planted_names);
  module.def("run_planted", [](const std::string& name, bool bug, uintptr_t in, uintptr_t out,
                               uintptr_t counter) {
    run_planted(name, bug, {at<float>(in), at<float>(out), at<unsigned>(counter)});
  });
  module.def("feature_names", &feature_names);
  module.def("run_feature", [](const std::string& name, uintptr_t in, uintptr_t out) {
    run_feature(name, at<uint32_t>(in), at<uint32_t>(out));
  });
  module.def("run_ldmatrix", [](bool transposed, uintptr_t rows, uintptr_t to) {
    run_ldmatrix(transposed, at<uint16_t>(rows), at<uint32_t>(to));
  });
  module.def("run_mma", [](bool bf16, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d) {
    run_mma(bf16, at<uint32_t>(a), at<uint32_t>(b), at<float>(c), at<float>(d));
  });
  module.def("run_wgmma", [](bool bf16, bool transposed, bool a_in_registers, uintptr_t a,
                             uintptr_t b, uintptr_t d) {
    run_wgmma(bf16, transposed, a_in_registers, at<uint16_t>(a), at<uint16_t>(b), at<float>(d));
  });
  module.def("run_numbers", [](const std::string& name, uintptr_t in, uintptr_t out, int count) {
    run_numbers(name, at<uint32_t>(in), at<uint32_t>(out), count);
  });
}
