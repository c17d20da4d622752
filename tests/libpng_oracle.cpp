// libpng_oracle.cpp - what libpng makes of a file, for the tests: its verdict and its un-filtered bytes.
// Compiled by the test that uses it, loaded with ctypes. No transformation is asked of libpng; interlaced files are
// left out.
#include <png.h>

#include <csetjmp>
#include <cstdint>
#include <cstring>

namespace {

struct Input {
  const uint8_t* data;
  size_t left;
};

void read_from_memory(png_structp png, png_bytep target, size_t nbytes) {
  auto* input = static_cast<Input*>(png_get_io_ptr(png));
  if (nbytes > input->left) png_error(png, "end of file");
  std::memcpy(target, input->data, nbytes);
  input->data += nbytes;
  input->left -= nbytes;
}

void be_quiet(png_structp, png_const_charp) {}

void jump(png_structp png, png_const_charp) { longjmp(png_jmpbuf(png), 1); }

}  // namespace

// Decodes to out (height rows of row_nbytes bytes): 0 when libpng read the file to its end, 1 when it raised an error,
// 2 when the image is not of the size, colour type and depth that the caller expects.
extern "C" int libpng_decode(const uint8_t* file, size_t nbytes, uint32_t width, uint32_t height, int color, int depth,
                             uint8_t* out, size_t row_nbytes) {
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, jump, be_quiet);
  png_infop info = png_create_info_struct(png);
  Input input{file, nbytes};
  if (setjmp(png_jmpbuf(png)) != 0) {
    png_destroy_read_struct(&png, &info, nullptr);
    return 1;
  }
  png_set_read_fn(png, &input, read_from_memory);
  png_read_info(png, info);
  const bool expected = png_get_image_width(png, info) == width && png_get_image_height(png, info) == height &&
                        png_get_color_type(png, info) == color && png_get_bit_depth(png, info) == depth &&
                        png_get_rowbytes(png, info) == row_nbytes;
  if (expected) {
    for (int passes = png_set_interlace_handling(png); passes > 0; --passes) {
      for (uint32_t y = 0; y < height; ++y) png_read_row(png, out + y * row_nbytes, nullptr);
    }
    png_read_end(png, nullptr);
  }
  png_destroy_read_struct(&png, &info, nullptr);
  return expected ? 0 : 2;
}
