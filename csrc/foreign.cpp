#include "foreign.hpp"

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "arrays.hpp"

namespace py = pybind11;

namespace fusedopt {
namespace {

// DLPack's structs, as its version 1 lays them out.
struct DLTensor {
  void* data;
  std::int32_t device_type, device_id, ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;  // in elements; strides may be null in C order
  std::uint64_t byte_offset;
};

struct Exchange {
  std::uint32_t major, minor;
  Exchange* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* stream;
};

constexpr std::int32_t CPU = 1, PINNED = 3;
constexpr std::uint8_t FLOAT = 2, BFLOAT = 4;

// Describes arrays, and remembers the interface of the type that came last: most lists have one.
class Reader {
 public:
  // False where this is no array in the host's memory whose type has the interface.
  bool read(PyObject* o, DLTensor& out) {
    if (Py_TYPE(o) != type_) {
      type_ = Py_TYPE(o);
      exchange_ = find(reinterpret_cast<PyObject*>(type_));
    }
    if (!exchange_) return false;
    if (exchange_->tensor_from_object(o, &out)) {
      PyErr_Clear();
      return false;
    }
    return out.device_type == CPU || out.device_type == PINNED;
  }

 private:
  static const Exchange* find(PyObject* type) {
    const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    constexpr const char* NAME = "dlpack_exchange_api";
    if (!PyCapsule_IsValid(capsule.ptr(), NAME)) return nullptr;
    const auto* const found =
        static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), NAME));
    return found->major == 1 ? found : nullptr;  // static, by DLPack's rules
  }

  PyTypeObject* type_ = nullptr;
  const Exchange* exchange_ = nullptr;
};

int format_of(const DLTensor& t) {
  if (t.lanes != 1) return -1;
  if (t.code == BFLOAT) return t.bits == 16 ? BF16 : -1;
  if (t.code != FLOAT) return -1;
  return t.bits == 32 ? F32 : t.bits == 64 ? F64 : t.bits == 16 ? F16 : -1;
}

// Arrays over the same memory, which keep their objects alive; None stays None. None for all where
// one of them is not such an array or of another dtype.
py::object arrays(const py::list& objects) {
  py::list found(objects.size());
  Reader reader;
  std::vector<py::ssize_t> shape, strides;
  for (std::size_t k = 0; k < objects.size(); ++k) {
    const py::handle o = objects[k];
    py::object array = py::none();
    if (!o.is_none()) {
      DLTensor t{};
      if (!reader.read(o.ptr(), t)) return py::none();
      const int format = format_of(t);
      if (format < 0) return py::none();
      const auto size = static_cast<py::ssize_t>(SIZES[format]);
      shape.assign(t.shape, t.shape + t.ndim);
      strides.clear();
      if (t.strides)
        for (int d = 0; d < t.ndim; ++d) strides.push_back(t.strides[d] * size);
      array = py::array(py::reinterpret_borrow<py::dtype>(numpy().dtypes[format]), shape, strides,
                        static_cast<char*>(t.data) + t.byte_offset, o);
    }
    PyList_SET_ITEM(found.ptr(), static_cast<py::ssize_t>(k), array.release().ptr());
  }
  return found;
}

}  // namespace

void bind_foreign(py::module_& module) {
  module.def("foreign_arrays", &arrays);
}

}  // namespace fusedopt
