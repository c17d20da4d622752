// inflate_careful.cpp - the decoder that decides what is a zlib stream and names what is wrong with one.
//
// One symbol at a time, every bound checked where it can be broken; several times slower than inflate.cpp, and meant to
// be read. It follows RFC 1950 and RFC 1951, and zlib where the RFCs leave room: a set of a single one-bit code
// (literals or distances) or of no code at all (distances) is accepted, any other incomplete set is not; the window
// size in the header is not held against the distances.
#include <cstring>

#include "adler32.h"
#include "deflate_format.h"
#include "inflate.h"

namespace cxrfast::png {
namespace {

constexpr char kBlockType[] = "invalid deflate block: unknown block type";
constexpr char kStoredLength[] = "invalid deflate block: stored length does not match its complement";
constexpr char kTooManySymbols[] = "invalid deflate block: too many literal or distance symbols";
constexpr char kLengthCode[] = "invalid deflate block: over-subscribed or incomplete code of the code lengths";
constexpr char kNothingToRepeat[] = "invalid deflate block: repeated code length without a previous one";
constexpr char kTooManyLengths[] = "invalid deflate block: more code lengths than symbols";
constexpr char kNoEndOfBlock[] = "invalid deflate block: no code for the end of the block";
constexpr char kLiteralCode[] = "invalid deflate block: over-subscribed or incomplete literal code";
constexpr char kDistanceCode[] = "invalid deflate block: over-subscribed or incomplete distance code";
constexpr char kBadLiteral[] = "invalid deflate block: invalid literal or length symbol";
constexpr char kBadDistance[] = "invalid deflate block: invalid distance symbol";
constexpr char kTooFarBack[] = "invalid deflate block: distance reaches before the start";

// A canonical code (RFC 1951, section 3.2.2): how many codes each length has, and the symbols in the order of their
// codes.
struct CanonicalCode {
  uint16_t count[kMaxCodeBits + 1];
  uint16_t symbol[kLiteralSymbols];

  // False for an over-subscribed set, and for an incomplete one unless `single_allowed` and it has one code of one bit
  // or none.
  bool build(const uint8_t* bits, int symbols, bool single_allowed) {
    std::memset(count, 0, sizeof count);
    for (int s = 0; s < symbols; ++s) ++count[bits[s]];
    uint16_t first[kMaxCodeBits + 2] = {};
    int unused = 1;  // codes of the current length that are still free
    for (int length = 1; length <= kMaxCodeBits; ++length) {
      unused = unused * 2 - count[length];
      if (unused < 0) return false;
      first[length + 1] = static_cast<uint16_t>(first[length] + count[length]);
    }
    for (int s = 0; s < symbols; ++s) {
      if (bits[s] != 0) symbol[first[bits[s]]++] = static_cast<uint16_t>(s);
    }
    const int used = symbols - count[0];
    count[0] = 0;
    return unused == 0 || (single_allowed && (used == 0 || (used == 1 && count[1] == 1)));
  }
};

class CarefulInflate {
 public:
  explicit CarefulInflate(const InflateJob& job)
      : in_(job.in), in_bits_(static_cast<uint64_t>(job.in_nbytes) * 8), out_(job.out), out_nbytes_(job.out_nbytes) {}

  Status run() {
    if (zlib_header() && blocks()) checksum();
    return status_;
  }

 private:
  bool fail(const char* message, uint64_t bit) {
    status_ = {Code::kCorrupt, message, static_cast<int64_t>(bit / 8)};
    return false;
  }

  bool fail(const char* message) { return fail(message, bit_); }

  // The next `count` <= 16 bits, lowest first.
  bool read(int count, uint32_t& value_ret) {
    if (in_bits_ - bit_ < static_cast<uint64_t>(count)) return fail(reason::kDataEndsEarly, in_bits_);
    value_ret = 0;
    for (int i = 0; i < count; ++i, ++bit_) {
      value_ret |= static_cast<uint32_t>((in_[bit_ / 8] >> (bit_ % 8)) & 1) << i;
    }
    return true;
  }

  bool read_symbol(const CanonicalCode& code, const char* message, int& symbol_ret) {
    const uint64_t start = bit_;
    int first = 0, index = 0, value = 0;  // first code of this length, and its place among the symbols
    for (int length = 1; length <= kMaxCodeBits; ++length) {
      if (bit_ == in_bits_) return fail(reason::kDataEndsEarly);
      value |= (in_[bit_ / 8] >> (bit_ % 8)) & 1;
      ++bit_;
      if (value - first < code.count[length]) {
        symbol_ret = code.symbol[index + value - first];
        return true;
      }
      index += code.count[length];
      first = (first + code.count[length]) * 2;
      value *= 2;
    }
    return fail(message, start);
  }

  bool zlib_header() {
    uint32_t method_and_window = 0, flags = 0;
    if (!read(8, method_and_window) || !read(8, flags)) return false;
    const bool good = (method_and_window * 256 + flags) % 31 == 0 && method_and_window % 16 == 8 &&
                      method_and_window / 16 <= 7 && (flags & 32) == 0;
    return good || fail(reason::kZlibHeader, 0);
  }

  bool blocks() {
    for (uint32_t last = 0; last == 0;) {
      uint32_t type = 0;
      const uint64_t start = bit_;
      if (!read(1, last) || !read(2, type)) return false;
      if (type == 3) return fail(kBlockType, start);
      if (!(type == 0 ? stored() : (type == 1 ? fixed_codes() : dynamic_codes()) && symbols())) return false;
    }
    if (done_ < out_nbytes_) return fail(reason::kDataEndsEarly);
    return true;
  }

  bool stored() {
    bit_ = (bit_ + 7) / 8 * 8;
    const uint64_t start = bit_;
    uint32_t nbytes = 0, complement = 0;
    if (!read(16, nbytes) || !read(16, complement)) return false;
    if ((nbytes ^ complement) != 0xFFFF) return fail(kStoredLength, start);
    if (nbytes > out_nbytes_ - done_) return fail(reason::kTooMuchData);
    if (nbytes > (in_bits_ - bit_) / 8) return fail(reason::kDataEndsEarly, in_bits_);
    if (nbytes > 0) std::memcpy(out_ + done_, in_ + bit_ / 8, nbytes);
    done_ += nbytes;
    bit_ += uint64_t{nbytes} * 8;
    return true;
  }

  bool fixed_codes() {
    uint8_t bits[kLiteralSymbols];
    for (int s = 0; s < kLiteralSymbols; ++s) bits[s] = fixed_literal_bits(s);
    literals_.build(bits, kLiteralSymbols, false);
    std::memset(bits, kFixedDistanceBits, kDistanceSymbols);
    distances_.build(bits, kDistanceSymbols, false);
    return true;
  }

  bool dynamic_codes() {
    const uint64_t start = bit_;
    uint32_t literals = 0, distances = 0, length_codes = 0;
    if (!read(5, literals) || !read(5, distances) || !read(4, length_codes)) return false;
    literals += kFirstLength;
    distances += 1;
    length_codes += 4;
    if (literals > kMaxDynamicLiteralSymbols || distances > kMaxDynamicDistanceSymbols)
      return fail(kTooManySymbols, start);

    uint8_t bits[kMaxDynamicLiteralSymbols + kMaxDynamicDistanceSymbols] = {};
    for (uint32_t i = 0; i < length_codes; ++i) {
      uint32_t value = 0;
      if (!read(3, value)) return false;
      bits[kLengthCodeOrder[i]] = static_cast<uint8_t>(value);
    }
    if (!literals_.build(bits, kLengthCodeSymbols, false)) return fail(kLengthCode, start);

    for (uint32_t i = 0; i < literals + distances;) {
      const uint64_t at = bit_;
      int symbol = 0;
      if (!read_symbol(literals_, kLengthCode, symbol)) return false;
      if (symbol < 16) {
        bits[i++] = static_cast<uint8_t>(symbol);
        continue;
      }
      uint32_t repeat = 0;
      if (symbol == 16 && i == 0) return fail(kNothingToRepeat, at);
      if (!read(symbol == 16 ? 2 : symbol == 17 ? 3 : 7, repeat)) return false;
      repeat += symbol == 18 ? 11 : 3;
      if (repeat > literals + distances - i) return fail(kTooManyLengths, at);
      std::memset(bits + i, symbol == 16 ? bits[i - 1] : 0, repeat);
      i += repeat;
    }
    if (bits[kEndOfBlock] == 0) return fail(kNoEndOfBlock, start);
    if (!literals_.build(bits, static_cast<int>(literals), true)) return fail(kLiteralCode, start);
    if (!distances_.build(bits + literals, static_cast<int>(distances), true)) return fail(kDistanceCode, start);
    return true;
  }

  // The symbols of one block, its end included.
  bool symbols() {
    for (;;) {
      const uint64_t start = bit_;
      int symbol = 0;
      if (!read_symbol(literals_, kBadLiteral, symbol)) return false;
      if (symbol == kEndOfBlock) return true;
      if (symbol < kEndOfBlock) {
        if (done_ == out_nbytes_) return fail(reason::kTooMuchData, start);
        out_[done_++] = static_cast<uint8_t>(symbol);
        continue;
      }
      if (symbol >= kFirstLength + kLengthSymbols) return fail(kBadLiteral, start);
      uint32_t extra = 0;
      if (!read(kLengthExtra[symbol - kFirstLength], extra)) return false;
      const size_t length = kLengthBase[symbol - kFirstLength] + extra;

      const uint64_t distance_start = bit_;
      if (!read_symbol(distances_, kBadDistance, symbol)) return false;
      if (symbol >= kMaxDynamicDistanceSymbols) return fail(kBadDistance, distance_start);
      if (!read(kDistanceExtra[symbol], extra)) return false;
      const size_t distance = kDistanceBase[symbol] + extra;
      if (distance > done_) return fail(kTooFarBack, distance_start);
      if (length > out_nbytes_ - done_) return fail(reason::kTooMuchData, start);
      for (size_t i = 0; i < length; ++i, ++done_) out_[done_] = out_[done_ - distance];
    }
  }

  bool checksum() {
    bit_ = (bit_ + 7) / 8 * 8;
    const uint64_t start = bit_;
    uint32_t high = 0, low = 0;
    if (!read(16, high) || !read(16, low)) return false;
    const auto swap = [](uint32_t two_bytes) { return (two_bytes >> 8) | ((two_bytes & 255) << 8); };
    const uint32_t expected = swap(high) << 16 | swap(low);  // the one big-endian number of the format
    return adler32(1, out_, out_nbytes_, Isa::kPortable) == expected || fail(reason::kAdler, start);
  }

  const uint8_t* in_;
  uint64_t in_bits_;
  uint64_t bit_ = 0;  // bits of the input that are used up, never more than in_bits_
  uint8_t* out_;
  size_t out_nbytes_;
  size_t done_ = 0;  // bytes written, never more than out_nbytes_
  CanonicalCode literals_, distances_;
  Status status_;
};

}  // namespace

void inflate_zlib_careful(InflateJob& job) { job.status = CarefulInflate(job).run(); }

}  // namespace cxrfast::png
