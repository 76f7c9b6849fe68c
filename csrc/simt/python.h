// simt for Python, by pybind11: a module of kernels calls bind(module) and adds its launchers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt.h"

namespace simt {

// Bytes between guards, for numpy.frombuffer or torch.frombuffer.
class Memory {
 public:
  Memory(size_t bytes, const std::string& name)
      : bytes_(bytes), pointer_(allocate(bytes, name.c_str())) {}
  Memory(const Memory&) = delete;
  ~Memory() { release(pointer_); }
  pybind11::buffer_info buffer() const {
    return {pointer_, 1, pybind11::format_descriptor<uint8_t>::format(), pybind11::ssize_t(bytes_)};
  }

 private:
  size_t bytes_;
  void* pointer_;
};

inline void bind(pybind11::module_& module) {
  namespace py = pybind11;
  py::register_exception<Error>(module, "Error", PyExc_RuntimeError);
  py::class_<Memory>(module, "Memory", py::buffer_protocol())
      .def(py::init<size_t, std::string>(), py::arg("bytes"), py::arg("name"))
      .def_buffer(&Memory::buffer);
  py::enum_<Order>(module, "Order")
      .value("forward", Order::forward)
      .value("reverse", Order::reverse)
      .value("random", Order::random);
  py::class_<LineCount>(module, "LineCount")
      .def_readonly("line", &LineCount::line)
      .def_readonly("accesses", &LineCount::accesses)
      .def_readonly("wavefronts", &LineCount::wavefronts)
      .def_readonly("ideal", &LineCount::ideal);
  module.def(
      "configure",
      [](Order order, uint64_t seed, unsigned preempt, int compute_capability) {
        options = {order, seed, preempt, compute_capability};
      },
      py::arg("order") = Order::forward, py::arg("seed") = 1, py::arg("preempt") = 0,
      py::arg("compute_capability") = 80);
  module.def("shared_counts", &shared_counts);
  module.def("clear_counts", &clear_counts);
  module.def("switches", [] { return switches; });
}

}  // namespace simt
