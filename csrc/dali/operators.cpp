// operators.cpp - the decoder of csrc/png as DALI operators: fn.cxrfast.decode and fn.cxrfast.decode_resize.
//
// CPU operators on DALI's own thread pool. A bad film is no error: its status and a message say why, its image is
// black, and the batch goes on. Exceptions are for wrong use only (a type, a size), and DALI turns them into Python's
// TypeError and ValueError.
// Left out: a GPU variant (the work is serial by nature), sequences, checkpoints (there is no state to keep).
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "dali/pipeline/operator/error_reporting.h"
#include "dali/pipeline/operator/op_schema.h"
#include "dali/pipeline/operator/operator.h"
#include "dali/pipeline/workspace/workspace.h"
#include "png/batch.h"

namespace cxrfast::dali_ops {

namespace {

using dali::CPUBackend;
using dali::OpSpec;
using dali::OutputDesc;
using dali::TensorList;
using dali::TensorListShape;
using dali::Workspace;
using png::BatchFilm;
using png::Isa;
using png::Limits;
using png::Status;

// Where the films of a batch are. Input 0: the files' bytes. Input 1, if given: paths that end with a null character;
// an empty one means that the bytes are in input 0.
std::vector<BatchFilm> films_of(const Workspace& ws) {
  for (int input = 0; input < ws.NumInput(); ++input) {
    const auto type = ws.Input<CPUBackend>(input).type();
    if (type != DALI_UINT8) {
      throw dali::DaliTypeError("input " + std::to_string(input) + " must be uint8, the bytes of " +
                                (input == 0 ? "a PNG file" : "a path") + ", got " + dali::TypeName(type).data());
    }
  }
  const auto& files = ws.Input<CPUBackend>(0);
  std::vector<BatchFilm> films(static_cast<size_t>(files.num_samples()));
  for (int i = 0; i < files.num_samples(); ++i) {
    BatchFilm& film = films[static_cast<size_t>(i)];
    film.file = files.tensor<uint8_t>(i);
    film.file_nbytes = static_cast<size_t>(files.tensor_shape_span(i)[0]);
    if (ws.NumInput() < 2) continue;
    const auto& paths = ws.Input<CPUBackend>(1);
    const int64_t nbytes = paths.tensor_shape_span(i)[0];
    if (nbytes == 0) continue;
    const uint8_t* path = paths.tensor<uint8_t>(i);
    if (path[nbytes - 1] != 0) {
      throw dali::DaliValueError("path " + std::to_string(i) + " of the batch must end with a null character");
    }
    film.path = reinterpret_cast<const char*>(path);
  }
  return films;
}

void write_statuses(const std::vector<BatchFilm>& films, TensorList<CPUBackend>& statuses,
                    TensorList<CPUBackend>& messages) {
  const int count = static_cast<int>(films.size());
  TensorListShape<> lengths(count, 1);
  for (int i = 0; i < count; ++i) {
    const Status& status = films[static_cast<size_t>(i)].status;
    lengths.set_tensor_shape(i, dali::TensorShape<>{static_cast<int64_t>(std::strlen(status.message))});
    auto* pair = statuses.mutable_tensor<int64_t>(i);
    pair[0] = static_cast<int64_t>(status.code);
    pair[1] = status.offset;
  }
  messages.Resize(lengths, DALI_UINT8);
  for (int i = 0; i < count; ++i) {
    const char* message = films[static_cast<size_t>(i)].status.message;
    if (message[0] != '\0') std::memcpy(messages.mutable_tensor<uint8_t>(i), message, std::strlen(message));
  }
}

// Images of one shape (or as many as there are) and two numbers for each film.
void resize_outputs(Workspace& ws, const TensorListShape<>& images, int pairs) {
  ws.Output<CPUBackend>(0).Resize(images, DALI_UINT8);
  ws.Output<CPUBackend>(0).SetLayout("HWC");
  const int count = images.num_samples();
  for (int output = 1; output <= pairs; ++output) {
    ws.Output<CPUBackend>(output).Resize(dali::uniform_list_shape(count, dali::TensorShape<>{2}), DALI_INT64);
  }
}

}  // namespace

// Bytes to prepared image. Each of DALI's threads takes the next film until none is left.
class DecodeResize : public dali::Operator<CPUBackend> {
 public:
  explicit DecodeResize(const OpSpec& spec) : Operator<CPUBackend>(spec), size_(spec.GetArgument<int>("size")) {
    if (size_ < static_cast<int>(png::kMinSize) || size_ > static_cast<int>(png::kMaxSize)) {
      throw dali::DaliValueError("size must be " + std::to_string(png::kMinSize) + " to " +
                                 std::to_string(png::kMaxSize) + " pixels, got " + std::to_string(size_));
    }
    for (int i = 0; i < num_threads_; ++i) workers_.push_back(std::make_unique<png::Worker>(Limits{}));
  }

 protected:
  bool SetupImpl(std::vector<OutputDesc>&, const Workspace&) override { return false; }

  void RunImpl(Workspace& ws) override {
    std::vector<BatchFilm> films = films_of(ws);
    const auto count = static_cast<int>(films.size());
    resize_outputs(ws, dali::uniform_list_shape(count, dali::TensorShape<>{size_, size_, 1}), 2);
    auto& images = ws.Output<CPUBackend>(0);
    for (int i = 0; i < count; ++i) films[static_cast<size_t>(i)].out = images.mutable_tensor<uint8_t>(i);

    png::Work work(films.data(), films.size(), {static_cast<uint32_t>(size_), png::best_isa()});
    png::FilmQueue queue;
    queue.add(work);
    dali::ThreadPool& pool = ws.GetThreadPool();
    for (int i = 0; i < num_threads_; ++i) {
      pool.AddWork([this, &queue](int thread) { workers_[static_cast<size_t>(thread)]->run(queue); });
    }
    pool.RunAll();

    auto& sums = ws.Output<CPUBackend>(2);
    for (int i = 0; i < count; ++i) {
      auto* pair = sums.mutable_tensor<int64_t>(i);
      pair[0] = films[static_cast<size_t>(i)].sum;
      pair[1] = films[static_cast<size_t>(i)].sumsq;
    }
    write_statuses(films, ws.Output<CPUBackend>(1), ws.Output<CPUBackend>(3));
  }

 private:
  const int size_;
  std::vector<std::unique_ptr<png::Worker>> workers_;  // one for each of DALI's threads
};

// Bytes to grey image at the film's own size. Two passes over the batch: the sizes must be known before DALI allocates.
class Decode : public dali::Operator<CPUBackend> {
 public:
  explicit Decode(const OpSpec& spec) : Operator<CPUBackend>(spec) {
    for (int i = 0; i < num_threads_; ++i) decoders_.push_back(std::make_unique<png::FilmDecoder>(Limits{}));
  }

 protected:
  bool SetupImpl(std::vector<OutputDesc>&, const Workspace&) override { return false; }

  void RunImpl(Workspace& ws) override {
    std::vector<BatchFilm> films = films_of(ws);
    const Isa isa = png::best_isa();
    if (opened_.size() < films.size()) opened_ = std::vector<Opened>(films.size());
    for_each(ws, films.size(), [&](size_t i, png::FilmDecoder& decoder) { open(films[i], opened_[i], decoder, isa); });

    const auto count = static_cast<int>(films.size());
    TensorListShape<> shapes(count, 3);
    for (int i = 0; i < count; ++i) {
      const png::Header& header = opened_[static_cast<size_t>(i)].chunks.header;
      const bool ok = films[static_cast<size_t>(i)].status.ok();
      shapes.set_tensor_shape(
          i, ok ? dali::TensorShape<>{int64_t{header.height}, int64_t{header.width}, 1} : dali::TensorShape<>{1, 1, 1});
    }
    resize_outputs(ws, shapes, 1);
    auto& images = ws.Output<CPUBackend>(0);
    for (int i = 0; i < count; ++i) films[static_cast<size_t>(i)].out = images.mutable_tensor<uint8_t>(i);
    for_each(ws, films.size(), [&](size_t i, png::FilmDecoder& decoder) {
      const auto nbytes = static_cast<size_t>(shapes[static_cast<int>(i)].num_elements());
      if (films[i].status.ok()) films[i].status = decoder.decode(films[i].file, opened_[i].chunks, films[i].out, isa);
      if (!films[i].status.ok()) std::memset(films[i].out, 0, nbytes);
      opened_[i].file.release_above(kKeptFileNbytes);
    });
    write_statuses(films, ws.Output<CPUBackend>(1), ws.Output<CPUBackend>(2));
  }

 private:
  static constexpr size_t kKeptFileNbytes = size_t{1} << 20;  // an NIH film is 0.7 MB at most; a batch has hundreds

  struct Opened {
    png::Buffer file;  // when it came as a path
    png::Chunks chunks;
  };

  // Reads the film if need be, and its chunks.
  static void open(BatchFilm& film, Opened& opened, const png::FilmDecoder& decoder, Isa isa) {
    if (film.path != nullptr) {
      film.status = png::read_file(film.path, decoder.limits(), &opened.file, &film.file_nbytes);
      film.file = opened.file.data();
    }
    if (film.status.ok()) {
      film.status = png::read_chunks(film.file, film.file_nbytes, decoder.limits(), isa, &opened.chunks);
    }
  }

  template <typename Work>
  void for_each(Workspace& ws, size_t count, const Work& work) {
    dali::ThreadPool& pool = ws.GetThreadPool();
    for (size_t i = 0; i < count; ++i) {
      pool.AddWork([this, &work, i](int thread) { work(i, *decoders_[static_cast<size_t>(thread)]); },
                   -static_cast<int64_t>(i));  // in order
    }
    pool.RunAll();
  }

  std::vector<std::unique_ptr<png::FilmDecoder>> decoders_;  // one for each of DALI's threads
  std::vector<Opened> opened_;                               // one for each film of a batch; kept for their memory
};

}  // namespace cxrfast::dali_ops

// ---- registration ----

DALI_SCHEMA(cxrfast__DecodeResize)
    .DocStr(R"(Decodes PNG films to grey and resizes them, as Pillow's ``convert("L")`` and
``resize((size, size), BILINEAR)`` do, bit for bit.

A bad film stops nothing: its image is black and its status says why.

Outputs:

* image, uint8 (size, size, 1)
* status, int64 (2): code (0 ok, 1 corrupt, 2 not a PNG film that this decoder knows, 3 beyond a limit) and the byte of
  the file at which the fault was seen, or -1
* sums, int64 (2): of the image's pixels and of their squares
* message, uint8 (n): one clause that says what is wrong; empty if nothing is

Raises TypeError for inputs that are not uint8, ValueError for a size out of range or a path that is not terminated.)")
    .NumInput(1, 2)
    .InputDox(0, "films", "1D TensorList of uint8", "The PNG files.")
    .InputDox(1, "paths", "1D TensorList of uint8",
              "Paths that end with a null character, read by the thread that decodes; empty where ``films`` has the "
              "file itself.")
    .NumOutput(4)
    .AddArg("size", "Side of the prepared image in pixels, 8 to 1024.", DALI_INT32);

DALI_REGISTER_OPERATOR(cxrfast__DecodeResize, cxrfast::dali_ops::DecodeResize, dali::CPU);

DALI_SCHEMA(cxrfast__Decode)
    .DocStr(R"(Decodes PNG films to grey at their own size, as Pillow's ``convert("L")`` does (16-bit samples: the high
byte), bit for bit.

A bad film stops nothing: its image is black, of its own size or 1 x 1, and its status says why.

Outputs:

* image, uint8 (H, W, 1)
* status, int64 (2): code (0 ok, 1 corrupt, 2 not a PNG film that this decoder knows, 3 beyond a limit) and the byte of
  the file at which the fault was seen, or -1
* message, uint8 (n): one clause that says what is wrong; empty if nothing is

Raises TypeError for inputs that are not uint8, ValueError for a path that is not terminated.)")
    .NumInput(1, 2)
    .InputDox(0, "films", "1D TensorList of uint8", "The PNG files.")
    .InputDox(1, "paths", "1D TensorList of uint8",
              "Paths that end with a null character, read by the threads that decode; empty where ``films`` has the "
              "file itself.")
    .NumOutput(3);

DALI_REGISTER_OPERATOR(cxrfast__Decode, cxrfast::dali_ops::Decode, dali::CPU);
