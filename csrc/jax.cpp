// The module fusedopt._jax: the handler that XLA calls for a step of fusedopt.jax. It needs nothing
// of the core but what Python has of it: XLA's buffers go to Python as addresses.
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <string_view>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
namespace py = pybind11;

namespace {

// A scalar of a step: its number, or the learning rate.
double value_of(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::S32:
      return *buffer.typed_data<std::int32_t>();
    case ffi::S64:
      return static_cast<double>(*buffer.typed_data<std::int64_t>());
    case ffi::F32:
      return *buffer.typed_data<float>();
    case ffi::F64:
      return *buffer.typed_data<double>();
    default:
      throw py::type_error("a step takes its number and a learning rate");
  }
}

// arguments: parameters, states, each of all leaves; then gradients. results: all but gradients, in
// the same memory, as `input_output_aliases` says.
ffi::Error step(ffi::AnyBuffer t, ffi::AnyBuffer lr, ffi::RemainingArgs arguments,
                ffi::RemainingRets results, std::string_view rule, std::int64_t leaves) {
  try {
    const py::gil_scoped_acquire locked;
    try {
      py::list elements, addresses;
      bool wide = false;
      for (std::size_t k = 0; k < arguments.size(); ++k) {
        const auto argument = arguments.get<ffi::AnyBuffer>(k);
        if (argument.has_error()) return argument.error();
        void* data = argument->untyped_data();
        if (k < results.size()) {
          auto result = results.get<ffi::AnyBuffer>(k);
          if (result.has_error()) return result.error();
          if ((*result)->untyped_data() != data)
            std::memcpy((*result)->untyped_data(), data, argument->size_bytes());
          data = (*result)->untyped_data();
        }
        if (k < static_cast<std::size_t>(leaves)) elements.append(argument->element_count());
        wide = argument->element_type() == ffi::F64;
        addresses.append(reinterpret_cast<std::uintptr_t>(data));
      }
      py::module_::import("fusedopt.jax")
          .attr("_run")(py::str(rule.data(), rule.size()), static_cast<std::int64_t>(value_of(t)),
                        value_of(lr), wide, elements, addresses);
      return ffi::Error::Success();
    } catch (const py::error_already_set& error) {
      return ffi::Error::Internal(error.what());
    }
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(handler, step,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("rule")
                                  .Attr<std::int64_t>("leaves"));

}  // namespace

PYBIND11_MODULE(_jax, module, py::mod_gil_not_used()) {
  module.attr("handler") = py::capsule(reinterpret_cast<void*>(handler));
}
