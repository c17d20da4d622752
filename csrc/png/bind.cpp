// bind.cpp - cxrfast._png: the decoder for Python. Shapes, defaults and messages are checked in
// cxrfast/decode/native.py; here only what memory safety needs is checked again.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <mutex>
#include <string>
#include <vector>

#include "png/batch.h"
#include "png/crc32.h"

namespace py = pybind11;

namespace {

using cxrfast::png::Batch;
using cxrfast::png::BatchFilm;
using cxrfast::png::Chunks;
using cxrfast::png::FilmDecoder;
using cxrfast::png::Isa;
using cxrfast::png::Limits;
using cxrfast::png::Status;

// Keeps a Python object's bytes in place, whatever other threads do, until it goes. bytes, bytearray, memoryview, mmap,
// ...
class HeldBytes {
 public:
  explicit HeldBytes(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  HeldBytes(HeldBytes&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
  HeldBytes(const HeldBytes&) = delete;
  HeldBytes& operator=(const HeldBytes&) = delete;
  ~HeldBytes() { PyBuffer_Release(&view_); }  // does nothing where obj is null

  const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
  size_t nbytes() const { return static_cast<size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

py::tuple status_tuple(const Status& status) {
  return py::make_tuple(static_cast<int>(status.code), status.message, status.offset);
}

class Pool {
 public:
  Pool(unsigned threads, uint64_t max_pixels, uint64_t max_memory_nbytes)
      : limits_{.max_pixels = max_pixels, .max_memory_nbytes = max_memory_nbytes},
        batch_(threads, limits_),
        decoder_(limits_) {}

  // paths[i]: bytes of a path (os.fsencode), or None: then films[i] is the file itself.
  py::tuple decode_resize(const py::list& films, const py::list& paths, py::array_t<uint8_t, py::array::c_style>& out) {
    const size_t count = films.size();
    const auto size = static_cast<uint32_t>(out.ndim() == 3 ? out.shape(1) : 0);
    if (paths.size() != count || out.ndim() != 3 || static_cast<size_t>(out.shape(0)) != count ||
        out.shape(1) != out.shape(2) || size < cxrfast::png::kMinSize || size > cxrfast::png::kMaxSize) {
      throw py::value_error("out must be uint8 (N, S, S) for N films and S within the sizes");
    }
    uint8_t* image = out.mutable_data();  // throws when it is read-only
    std::vector<HeldBytes> held;
    std::vector<std::string> names;
    held.reserve(count);
    names.reserve(count);  // no later growth: BatchFilm points into them
    std::vector<BatchFilm> jobs(count);
    for (size_t i = 0; i < count; ++i) {
      jobs[i].out = image + i * size * size;
      if (paths[i].is_none()) {
        held.emplace_back(films[i]);
        jobs[i].file = held.back().data();
        jobs[i].file_nbytes = held.back().nbytes();
      } else {
        jobs[i].path = names.emplace_back(py::cast<std::string>(paths[i])).c_str();
      }
    }
    const Isa isa = cxrfast::png::best_isa();
    {
      const py::gil_scoped_release release;
      batch_.decode_resize(jobs.data(), count, size, isa);
    }
    py::dict failures;  // row -> (code, message, offset); most batches have none
    py::array_t<int64_t> sums(static_cast<py::ssize_t>(count)), sumsqs(static_cast<py::ssize_t>(count));
    for (size_t i = 0; i < count; ++i) {
      sums.mutable_data()[i] = jobs[i].sum;
      sumsqs.mutable_data()[i] = jobs[i].sumsq;
      if (!jobs[i].status.ok()) failures[py::int_(i)] = status_tuple(jobs[i].status);
    }
    return py::make_tuple(failures, sums, sumsqs);
  }

  // (status, image or None). The image is uint8 (H, W).
  py::tuple decode(py::handle film, py::handle path) {
    cxrfast::png::Buffer buffer;
    Status status;
    const uint8_t* file = nullptr;
    size_t nbytes = 0;
    std::vector<HeldBytes> held;
    if (path.is_none()) {
      held.emplace_back(film);
      file = held.back().data();
      nbytes = held.back().nbytes();
    } else {
      const auto name = py::cast<std::string>(path);
      const py::gil_scoped_release release;
      status = cxrfast::png::read_file(name.c_str(), limits_, &buffer, &nbytes);
      file = buffer.data();
    }
    const Isa isa = cxrfast::png::best_isa();
    Chunks chunks;
    if (status.ok()) status = cxrfast::png::read_chunks(file, nbytes, limits_, isa, &chunks);
    if (!status.ok()) return py::make_tuple(status_tuple(status), py::none());
    py::array_t<uint8_t> image(
        {static_cast<py::ssize_t>(chunks.header.height), static_cast<py::ssize_t>(chunks.header.width)});
    uint8_t* pixels = image.mutable_data();
    {
      const py::gil_scoped_release release;
      const std::lock_guard lock(decoder_mutex_);
      status = decoder_.decode(file, chunks, pixels, isa);
    }
    if (!status.ok()) return py::make_tuple(status_tuple(status), py::none());
    return py::make_tuple(status_tuple(status), image);
  }

 private:
  Limits limits_;
  Batch batch_;
  FilmDecoder decoder_;
  std::mutex decoder_mutex_;
};

}  // namespace

PYBIND11_MODULE(_png, module) {
  module.doc() =
      "PNG films to grey images; use it through cxrfast.decode_resize, cxrfast.decode and cxrfast.decode.native.";
  py::class_<Pool>(module, "Pool")
      .def(py::init<unsigned, uint64_t, uint64_t>(), py::arg("threads"), py::arg("max_pixels"),
           py::arg("max_memory_nbytes"))
      .def("decode_resize", &Pool::decode_resize, py::arg("films"), py::arg("paths"), py::arg("out").noconvert())
      .def("decode", &Pool::decode, py::arg("film"), py::arg("path"));
  module.def("crc32", [](py::handle data) {
    const HeldBytes held(data);
    return cxrfast::png::crc32(0, held.data(), held.nbytes(), cxrfast::png::best_isa());
  });
  module.def("cpu_isa", [] { return cxrfast::png::isa_name(cxrfast::png::cpu_isa()); });
  module.def("best_isa", [] { return cxrfast::png::isa_name(cxrfast::png::best_isa()); });
}
