// inflate_kernel.h - the fast inflate, compiled once for each instruction set: inflate_portable.cpp, inflate_avx2.cpp.
//
// The including file opens an anonymous namespace, says what the CPU has (CXRFAST_INFLATE_BMI2), includes this, and
// calls run_streams. Everything here may give up at any point (kFailed): inflate.cpp then asks the careful decoder.
//
// Note [a step]
// A step of one stream is straight-line code: two look-ups in the literal table, one in the distance table, one copy of
// 16 bytes; every part happens whether it is needed or not, because half-predictable branches cost more than idle work.
// A literal entry holds up to three literals and perhaps the length behind them. What must not happen is steered by the
// tables:
// - after a length, the second look-up is steered (the entry's `next`) to a neutral entry: no bits, no bytes, "a length
//   is waiting";
// - without a length, the distance look-up is steered (the entry's `distance`) to a neutral entry: no bits, a harmless
//   distance; the copy then moves 16 stale bytes to where the next step writes, and the length 0 makes nothing of it.
// Two branches are left, both rarely taken:
// - An entry of no bits at the first look-up: a code longer than the index, a length whose extra bits do not fit, a
//   length above 16, the end of the block. Stream::symbol decides, except that long literals are decoded in place.
// - A source before the start of the output. Either the file is broken; or the neutral distance reaches back too far
//   at the very start; or the entry's distance was made absurd on purpose. The rest of an absurd distance is the true
//   one, so short that the copy would overlap itself (copy_pattern), or 0 for a code longer than the index:
//   Stream::match decides.
//
// Note [where a stream is]
// The position is one number, the address in bits, so that a stream needs two registers (position, output) and four
// streams fit into sixteen. A step takes at most kStepBits and writes at most kStepNbytes; the number of steps that are
// safe for every stream is computed before them, so the steps themselves check nothing, read inside the input and write
// inside the output.

// One entry of the literal table, as a little-endian number:
//   bits 0-23 up to three literals, first lowest   24-31 their count   32-39 bits used, 0: Stream::symbol must look
//   40-47 length, 0: none   48-55 next: kSteer, or 0 behind a length   56-63 distance: kSteer behind a length, or 0
// and of the distance table:
//   bits 0-31 base   32-47 where the extra bits are   48-55 bits used, extra included   56-63 code length
constexpr int kIndexBits = 10;
constexpr int kDistanceIndexBits = 9;
constexpr size_t kMaxCopy = 16;
constexpr int kMaxLiterals = 3;
constexpr int kStepBits = 2 * kIndexBits + kDistanceIndexBits + 13;
static_assert(kStepBits <= 64 - 7, "one load must be enough for a step");
constexpr size_t kStepNbytes = 2 * kMaxLiterals + kMaxCopy;
static_assert(kStepNbytes + 8 <= 32 && kStepBits <= 64,
              "what Stream::safe_steps divides by; copy_pattern may write 8 more");

// A steered look-up's index is empty, and it starts kSteer entries lower: at the neutral entry.
#ifdef CXRFAST_INFLATE_BMI2
constexpr int kSteer = kIndexBits, kDistanceSteer = kDistanceIndexBits;  // the width of the index as well
#else
constexpr int kSteer = 1, kDistanceSteer = 1;
#endif

constexpr int kLiteralCountShift = 24, kBitsShift = 32, kLengthShift = 40, kNextShift = 48, kDistanceShift = 56;
constexpr uint64_t kLook = uint64_t{kSteer} << kNextShift;  // an entry that leaves everything to Stream::symbol
constexpr uint64_t kLengthWaits = uint64_t{kDistanceSteer} << kDistanceShift;  // the neutral entry behind a length
// The neutral distance: far enough back that its bytes have left the store queue.
constexpr uint64_t kNoDistance = 512;
constexpr uint64_t kAbsurdDistance = uint64_t{1} << 30;  // added to distances; no output that comes here is as long
constexpr uint64_t kMaxFastNbytes = kAbsurdDistance;

inline uint64_t load64(const uint8_t* at) {
  uint64_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

inline uint64_t low_bits(uint64_t value, unsigned count) {
#ifdef CXRFAST_INFLATE_BMI2
  return _bzhi_u64(value, count);
#else
  return value & ((uint64_t{1} << count) - 1);
#endif
}

// The code of 15 bits, first bit highest, that starts at the lowest bit.
inline uint32_t code_bits(uint64_t bits) {
  return (uint32_t{kReversedByte[bits & 255]} << 8 | kReversedByte[bits >> 8 & 255]) >> 1;
}

// A canonical code, for one symbol of any length at a time.
struct CanonicalCode {
  // [l]: the last of the codes of up to l bits, as a number of 15 bits, -1 where there is none; [0]: above all codes.
  alignas(32) int16_t last[kMaxCodeBits + 1];
  uint16_t count[kMaxCodeBits + 1];  // [l]: codes of l bits; [0] = 0
  int32_t shift_to_index[kMaxCodeBits + 1];
  uint16_t symbol[kLiteralSymbols];  // in the order of their codes

  // False for a set that the careful decoder must look at: over-subscribed, or incomplete unless it is one code of one
  // bit or none.
  bool build(const uint8_t* bits, int symbols) {
    uint16_t counts[2][kMaxCodeBits + 1] = {};
    int s = 0;
    for (; s + 1 < symbols; s += 2) {
      ++counts[0][bits[s]];
      ++counts[1][bits[s + 1]];
    }
    if (s < symbols) ++counts[0][bits[s]];
    uint16_t first[kMaxCodeBits + 1];
    uint32_t code = 0;
    uint16_t index = 0;
    last[0] = INT16_MAX;
    count[0] = 0;
    shift_to_index[0] = 0;
    for (int length = 1; length <= kMaxCodeBits; ++length) {
      count[length] = static_cast<uint16_t>(counts[0][length] + counts[1][length]);
      first[length] = index;
      shift_to_index[length] = index - static_cast<int32_t>(code >> (kMaxCodeBits - length));
      code += uint32_t{count[length]} << (kMaxCodeBits - length);
      if (code > 1u << kMaxCodeBits) return false;
      last[length] = static_cast<int16_t>(code - 1);
      index = static_cast<uint16_t>(index + count[length]);
    }
    if (code != 1u << kMaxCodeBits && !(index == 0 || (index == 1 && count[1] == 1))) return false;
    first[0] = kLiteralSymbols;  // unused
    for (s = 0; s < symbols; ++s) {
      if (bits[s] != 0) symbol[first[bits[s]]++] = static_cast<uint16_t>(s);
    }
    return true;
  }

  bool complete() const { return last[kMaxCodeBits] == INT16_MAX; }

  // The symbol whose code comes first in `bits`, and the code's length; -1 where there is none.
  [[gnu::always_inline]] int decode(uint64_t bits, unsigned& length_ret) const {
    const uint32_t code = code_bits(bits);
#ifdef CXRFAST_INFLATE_BMI2
    const __m256i longer = _mm256_cmpgt_epi16(_mm256_set1_epi16(static_cast<int16_t>(code)),
                                              _mm256_load_si256(reinterpret_cast<const __m256i*>(last)));
    const unsigned length =
        1 + static_cast<unsigned>(_mm_popcnt_u32(static_cast<uint32_t>(_mm256_movemask_epi8(longer)))) / 2;
#else
    unsigned length = 1;
    for (int l = 1; l <= kMaxCodeBits; ++l) length += static_cast<int32_t>(code) > last[l];
#endif
    length_ret = length;
    if (length > kMaxCodeBits) return -1;
    return symbol[shift_to_index[length] + static_cast<int32_t>(code >> (kMaxCodeBits - length))];
  }
};

enum class Outcome : uint8_t { kContinue, kFinished, kFailed };

#ifdef CXRFAST_INFLATE_BMI2
struct Repeats {
  alignas(16) uint8_t of[kMaxCopy][kMaxCopy];
  constexpr const uint8_t* operator[](size_t i) const { return of[i]; }
};
constexpr Repeats kRepeat = [] {
  Repeats repeats{};
  for (size_t distance = 1; distance <= kMaxCopy; ++distance) {
    for (size_t i = 0; i < kMaxCopy; ++i) repeats.of[distance - 1][i] = static_cast<uint8_t>(i % distance);
  }
  return repeats;
}();
#endif

constexpr auto kReversedIndex = reversed_bits<kIndexBits>();

struct Stream {
  // [0]: neutral; [kSteer + index]. See Note [a step].
  alignas(64) uint64_t literals[kSteer + (1 << kIndexBits)];
  alignas(64) uint64_t distances[kDistanceSteer + (1 << kDistanceIndexBits)];

  uint64_t position;    // of the next bit, as an address in bits
  uint8_t* out;         // of the next byte
  uint8_t* out_begin;   // no match reaches before it
  uint8_t* out_end;     // nothing is written behind it, except into the padding
  size_t later_nbytes;  // of the output, behind out_end: the window must slide first
  uint8_t* due;         // once `out` is here a segment is complete; behind out_end where there are none
  uint64_t end;         // of the input, as an address in bits
  uint8_t* summed;      // up to here the checksum holds
  uint32_t adler;
  bool last_block;
  InflateJob* job;
  InflateFeed* feed;
  CanonicalCode literal_code, distance_code;

  uint64_t peek() const { return load64(reinterpret_cast<const uint8_t*>(position >> 3)) >> (position & 7); }

  uint32_t take(int count) {
    const uint32_t value = static_cast<uint32_t>(low_bits(peek(), static_cast<unsigned>(count)));
    position += static_cast<uint64_t>(count);
    return value;
  }

  // How many steps cannot pass either end, whatever the data.
  uint64_t safe_steps() const {
    return position >= end ? 0 : std::min<uint64_t>((end - position) >> 6, static_cast<uint64_t>(out_end - out) >> 5);
  }

  Outcome start(InflateJob& next, InflateFeed& from) {
    job = &next;
    feed = &from;
    if (next.in_nbytes < kZlibHeaderNbytes + kZlibTrailerNbytes || next.out_nbytes >= kMaxFastNbytes)
      return Outcome::kFailed;
    const unsigned method_and_window = next.in[0], flags = next.in[1];
    if ((method_and_window * 256 + flags) % 31 != 0 || method_and_window % 16 != 8 || method_and_window / 16 > 7 ||
        (flags & 32) != 0) {
      return Outcome::kFailed;
    }
    position = (reinterpret_cast<uint64_t>(next.in) + kZlibHeaderNbytes) * 8;
    end = (reinterpret_cast<uint64_t>(next.in) + next.in_nbytes) * 8;
    out = out_begin = summed = next.out + (next.segment_nbytes > 0 ? kWindow : 0);
    due = out + (next.segment_nbytes > 0 ? next.segment_nbytes : next.out_nbytes + 1);
    set_out_end(next.out_nbytes);
    adler = 1;
    literals[0] = kLengthWaits;
    distances[0] = kNoDistance;
    last_block = false;
    return next_block();
  }

  // left_nbytes: of the output, from `out` on.
  void set_out_end(size_t left_nbytes) {
    const size_t room = static_cast<size_t>(due - out) + (job->segment_nbytes > 0 ? kMaxMatch + kInflatePad : 0);
    out_end = out + std::min(left_nbytes, room);
    later_nbytes = left_nbytes - static_cast<size_t>(out_end - out);
  }

  // Hands over the segments that are complete; the window slides along, so that there is room for a match again.
  void hand_over() {
    while (out >= due) {
      const size_t nbytes = job->segment_nbytes, left_nbytes = later_nbytes + static_cast<size_t>(out_end - out);
      add_to_sum();
      feed->segment(*job, due - nbytes, nbytes);
      std::memmove(job->out, job->out + nbytes, static_cast<size_t>(out - job->out) - nbytes);
      out -= nbytes;
      summed = out;
      out_begin = job->out + (static_cast<size_t>(out_begin - job->out) > nbytes ? out_begin - job->out - nbytes : 0);
      set_out_end(left_nbytes);
    }
  }

  // What is left of a stream that has ended well.
  void hand_over_rest() {
    hand_over();
    const uint8_t* begin = due - job->segment_nbytes;
    if (job->segment_nbytes > 0 && out > begin) feed->segment(*job, begin, static_cast<size_t>(out - begin));
  }

  void add_to_sum() {
    adler = adler32(adler, summed, static_cast<size_t>(out - summed), kIsa);
    summed = out;
  }

  // From the end of a block to the first symbol of the next one that has symbols, or to the end of the stream.
  Outcome next_block() {
    add_to_sum();
    for (;;) {
      if (last_block) return finish();
      if (position + 3 > end) return Outcome::kFailed;
      last_block = take(1) != 0;
      const uint32_t type = take(2);
      if (type == 0) {
        if (!stored()) return Outcome::kFailed;
        continue;
      }
      return (type == 1 && fixed_codes()) || (type == 2 && dynamic_codes()) ? Outcome::kContinue : Outcome::kFailed;
    }
  }

  bool stored() {
    position = (position + 7) & ~uint64_t{7};
    if (position + 32 > end) return false;
    uint32_t nbytes = take(16);
    const uint32_t complement = take(16);
    if ((nbytes ^ complement) != 0xFFFF || nbytes > (end - position) / 8 ||
        nbytes > later_nbytes + static_cast<size_t>(out_end - out)) {
      return false;
    }
    while (nbytes > 0) {
      hand_over();
      const uint32_t part = static_cast<uint32_t>(std::min<size_t>(nbytes, static_cast<size_t>(out_end - out)));
      std::memcpy(out, reinterpret_cast<const uint8_t*>(position >> 3), part);
      out += part;
      position += uint64_t{part} * 8;
      nbytes -= part;
    }
    add_to_sum();
    return true;
  }

  Outcome finish() {
    position = (position + 7) & ~uint64_t{7};
    if (position + 32 > end || out != out_end || later_nbytes > 0) return Outcome::kFailed;
    const uint8_t* sum = reinterpret_cast<const uint8_t*>(position >> 3);
    const uint32_t expected = uint32_t{sum[0]} << 24 | uint32_t{sum[1]} << 16 | uint32_t{sum[2]} << 8 | sum[3];
    return adler == expected ? Outcome::kFinished : Outcome::kFailed;
  }

  bool fixed_codes() {
    uint8_t bits[kLiteralSymbols];
    for (int s = 0; s < kLiteralSymbols; ++s) bits[s] = fixed_literal_bits(s);
    literal_code.build(bits, kLiteralSymbols);
    std::memset(bits, kFixedDistanceBits, kDistanceSymbols);
    distance_code.build(bits, kDistanceSymbols);
    fill_literals();
    fill_distances();
    return true;
  }

  bool dynamic_codes() {
    const int literal_count = static_cast<int>(take(5)) + kFirstLength, distance_count = static_cast<int>(take(5)) + 1;
    const int length_codes = static_cast<int>(take(4)) + 4;
    if (literal_count > kMaxDynamicLiteralSymbols || distance_count > kMaxDynamicDistanceSymbols) return false;
    uint8_t bits[kMaxDynamicLiteralSymbols + kMaxDynamicDistanceSymbols + 138];
    uint8_t length_bits[kLengthCodeSymbols] = {};
    {
      uint64_t sent = peek();  // 19 * 3 = 57 bits
      for (int i = 0; i < length_codes; ++i, sent >>= 3) length_bits[kLengthCodeOrder[i]] = sent & 7;
      position += static_cast<uint64_t>(length_codes) * 3;
    }
    uint8_t symbol_of[1 << kMaxLengthCodeBits], bits_of[1 << kMaxLengthCodeBits];
    if (!fill_length_code(length_bits, symbol_of, bits_of)) return false;

    const int total = literal_count + distance_count;
    for (int i = 0; i < total;) {
      if (position > end) return false;
      const uint64_t sent = peek();
      const int symbol = symbol_of[sent & 127], used = bits_of[sent & 127];
      if (symbol < 16) {
        bits[i++] = static_cast<uint8_t>(symbol);
        position += static_cast<uint64_t>(used);
        continue;
      }
      const int extra_bits = symbol == 16 ? 2 : symbol == 17 ? 3 : 7;
      const int repeat =
          (symbol == 18 ? 11 : 3) + static_cast<int>(low_bits(sent >> used, static_cast<unsigned>(extra_bits)));
      if (repeat > total - i || (symbol == 16 && i == 0)) return false;
      std::memset(bits + i, symbol == 16 ? bits[i - 1] : 0, static_cast<size_t>(repeat));
      i += repeat;
      position += static_cast<uint64_t>(used + extra_bits);
    }
    if (position > end || bits[kEndOfBlock] == 0 || !literal_code.build(bits, literal_count) ||
        !distance_code.build(bits + literal_count, distance_count)) {
      return false;
    }
    fill_literals();
    fill_distances();
    return true;
  }

  // The code of the code lengths, for all 128 values of its next 7 bits; false unless the set is complete.
  static bool fill_length_code(const uint8_t* length_bits, uint8_t* symbol_of, uint8_t* bits_of) {
    CanonicalCode code;
    if (!code.build(length_bits, kLengthCodeSymbols) || !code.complete()) return false;
    const uint16_t* symbol = code.symbol;
    uint32_t next = 0;  // the next code, first bit highest, in 7 bits
    for (int length = 1; length <= kMaxLengthCodeBits; ++length) {
      for (int i = 0; i < code.count[length]; ++i, ++symbol, next += 128u >> length) {
        for (uint32_t at = kReversedByte[next] >> 1; at < 128; at += 1u << length) {
          symbol_of[at] = static_cast<uint8_t>(*symbol);
          bits_of[at] = static_cast<uint8_t>(length);
        }
      }
    }
    return true;
  }

  // Note [the literal table]
  // In an index whose first bit is the highest, a symbol's entries lie side by side, and they are that symbol followed
  // by what the remaining m bits say: known[m], a smaller table of the same kind. So every table is made of runs of
  // smaller ones, by vector instructions; at the end the largest is brought into the order in which the bits arrive,
  // lowest first.
  void fill_literals() {
    alignas(64) uint64_t tables[2 << kIndexBits];  // known[m] at 2^m
    uint8_t bits_of[kEndOfBlock];                  // only of literals with codes within the index
    int shortest = kIndexBits;
    const uint16_t* symbol = literal_code.symbol;
    for (int length = 1; length <= kIndexBits; ++length) {
      for (int i = 0; i < literal_code.count[length]; ++i, ++symbol) {
        if (*symbol >= kEndOfBlock) continue;
        bits_of[*symbol] = static_cast<uint8_t>(length);
        shortest = std::min(shortest, length);
      }
    }
    for (int m = 0; m <= kIndexBits - shortest; ++m) fill_known(tables, m, shortest, bits_of);
    fill_known(tables, kIndexBits, shortest, bits_of);
    const uint64_t* largest = tables + (1 << kIndexBits);
    uint64_t* table = literals + kSteer;
    for (uint32_t i = 0; i < 1u << kIndexBits; ++i) table[i] = largest[kReversedIndex[i]];
  }

  void fill_known(uint64_t* tables, int m, int shortest, const uint8_t* bits_of) const {
    uint64_t* to = tables + (size_t{1} << m);
    uint64_t* const to_end = to + (size_t{1} << m);
    const uint16_t* symbol = literal_code.symbol;
    const bool too_many =
        shortest * (kMaxLiterals + 1) <= m;  // more literals might fit into the bits than into an entry
    for (int length = 1; length <= m; ++length) {
      const size_t run = size_t{1} << (m - length);
      for (int i = 0; i < literal_code.count[length]; ++i, ++symbol, to += run) {
        if (*symbol < kEndOfBlock) {
          const uint64_t* from = tables + run;
          const uint64_t front =
              *symbol + (uint64_t{1} << kLiteralCountShift) + (static_cast<uint64_t>(length) << kBitsShift);
          if (too_many) {
            for (size_t k = 0; k < run; ++k) to[k] = prefixed(without_fourth(from[k], bits_of)) + front;
          } else {
            for (size_t k = 0; k < run; ++k) to[k] = prefixed(from[k]) + front;
          }
        } else {
          fill_length(to, run, *symbol, length, m);
        }
      }
    }
    std::fill(to, to_end, kLook);
  }

  // The entry, or its first two literals if it has three: with one more in front there is room for no other.
  static uint64_t without_fourth(uint64_t entry, const uint8_t* bits_of) {
    if ((entry >> kLiteralCountShift & 255) < kMaxLiterals) return entry;
    if ((entry >> kLengthShift & 255) != 0) return kLook;  // how many bits its length had is not known any more
    return entry - (uint64_t{1} << kLiteralCountShift) - (uint64_t{bits_of[entry >> 16 & 255]} << kBitsShift);
  }

  // Makes room for one literal in front.
  static uint64_t prefixed(uint64_t entry) { return (entry & ~uint64_t{0xFFFFFF}) | ((entry << 8) & 0xFFFFFF); }

  static void fill_length(uint64_t* to, size_t run, int symbol, int length, int m) {
    const int which = symbol - kFirstLength;
    const int extra_bits = which >= 0 && which < kLengthSymbols ? kLengthExtra[which] : kIndexBits;
    if (symbol == kEndOfBlock || length + extra_bits > m) {
      std::fill(to, to + run, kLook);
      return;
    }
    const size_t part = run >> extra_bits;
    for (uint32_t extra = 0; extra < 1u << extra_bits; ++extra, to += part) {
      const size_t value = kLengthBase[which] + size_t{kReversedByte[extra]} / (256u >> extra_bits);
      const uint64_t entry =
          static_cast<uint64_t>(length + extra_bits) << kBitsShift | uint64_t{value} << kLengthShift | kLengthWaits;
      std::fill(to, to + part, value <= kMaxCopy ? entry : kLook);
    }
  }

  void fill_distances() {
    uint64_t* table = distances + kDistanceSteer;
    std::fill(table, table + (1 << kDistanceIndexBits), kAbsurdDistance);
    const uint16_t* symbol = distance_code.symbol;
    uint32_t next = 0;  // the next code, first bit highest, in kMaxCodeBits bits
    for (int length = 1; length <= kDistanceIndexBits; ++length) {
      for (int i = 0; i < distance_code.count[length]; ++i, ++symbol, next += 1u << (kMaxCodeBits - length)) {
        if (*symbol >= kMaxDynamicDistanceSymbols) continue;
        const uint64_t extra_bits = kDistanceExtra[*symbol], code_length = static_cast<uint64_t>(length);
#ifdef CXRFAST_INFLATE_BMI2
        const uint64_t where = extra_bits << 8 | code_length;
#else
        const uint64_t where = (uint64_t{1} << extra_bits) - 1;
#endif
        const uint64_t base = kDistanceBase[*symbol] | (kDistanceBase[*symbol] < kMaxCopy ? kAbsurdDistance : 0);
        const uint64_t entry = base | where << 32 | (code_length + extra_bits) << 48 | code_length << 56;
        for (uint32_t at = code_bits(next); at < 1u << kDistanceIndexBits; at += 1u << length) table[at] = entry;
      }
    }
  }

  // One symbol, with all checks; a length goes on with its distance.
  Outcome symbol() {
    const uint64_t bits = peek();
    unsigned used = 0;
    const int s = literal_code.decode(bits, used);
    if (s < 0) return Outcome::kFailed;
    position += used;
    if (s < kEndOfBlock) {
      if (out == out_end || position > end) return Outcome::kFailed;
      *out++ = static_cast<uint8_t>(s);
      return Outcome::kContinue;
    }
    if (s == kEndOfBlock) return next_block();
    if (s >= kFirstLength + kLengthSymbols) return Outcome::kFailed;
    const int extra_bits = kLengthExtra[s - kFirstLength];
    position += static_cast<uint64_t>(extra_bits);
    return match(kLengthBase[s - kFirstLength] + low_bits(bits >> used, static_cast<unsigned>(extra_bits)));
  }

  // The distance of a length, and the copy, with all checks.
  Outcome match(size_t length) {
    const uint64_t bits = peek();
    unsigned used = 0;
    const int s = distance_code.decode(bits, used);
    if (s < 0 || s >= kMaxDynamicDistanceSymbols) return Outcome::kFailed;
    const int extra_bits = kDistanceExtra[s];
    const size_t distance = kDistanceBase[s] + low_bits(bits >> used, static_cast<unsigned>(extra_bits));
    position += used + static_cast<uint64_t>(extra_bits);
    if (position > end || distance > static_cast<size_t>(out - out_begin) ||
        length > static_cast<size_t>(out_end - out)) {
      return Outcome::kFailed;
    }
    copy(out, distance, length, out_end);
    out += length;
    return Outcome::kContinue;
  }

  static void copy(uint8_t* to, size_t distance, size_t length, const uint8_t* limit) {
    const uint8_t* from = to - distance;
    if (distance >= 16 && static_cast<size_t>(limit - to) >= length + 16) {
      for (size_t i = 0; i < length; i += 16) std::memcpy(to + i, from + i, 16);
    } else if (distance == 1) {
      std::memset(to, *from, length);
    } else {
      for (size_t i = 0; i < length; ++i) to[i] = from[i];
    }
  }
};

// Why the steps of a set of streams stopped, and for which of them.
enum class Stop : uint8_t { kSteps, kSymbol, kMatch };
struct Stopped {
  Stop why;
  int stream;
  size_t length;  // kMatch: of the match
};

// Note [the loads of a step]
// What a step reads of its tables, byte by byte at base + kOffset + 8 * index: three loads a cycle cost less than the
// shifts that would take one loaded entry apart. Compilers disagree (they compute the address first, or load once and
// shift), so on BMI2 these are single instructions by decree, as are the shifts whose count and operand they would copy
// first.
#ifdef CXRFAST_INFLATE_BMI2

template <size_t kOffset>
[[gnu::always_inline]] inline uint64_t load_u8(const void* base, uint64_t index) {
  uint64_t value;
  asm("movzbl %c3(%1,%2,8), %k0" : "=r"(value) : "r"(base), "r"(index), "i"(kOffset));
  return value;
}

template <size_t kOffset>
[[gnu::always_inline]] inline uint64_t load_u16(const void* base, uint64_t index) {
  uint64_t value;
  asm("movzwl %c3(%1,%2,8), %k0" : "=r"(value) : "r"(base), "r"(index), "i"(kOffset));
  return value;
}

template <size_t kOffset>
[[gnu::always_inline]] inline uint32_t load_u32(const void* base, uint64_t index) {
  uint32_t value;
  asm("movl %c3(%1,%2,8), %k0" : "=r"(value) : "r"(base), "r"(index), "i"(kOffset));
  return value;
}

template <size_t kOffset>
[[gnu::always_inline]] inline uint64_t add_u32(uint64_t value, const void* base, uint64_t index) {
  asm("addl %c3(%1,%2,8), %k0" : "+r"(value) : "r"(base), "r"(index), "i"(kOffset) : "cc");
  return value;
}

// The bits at `position`. `three` is 3, in a register.
[[gnu::always_inline]] inline uint64_t bits_at(uint64_t position, uint64_t three) {
  struct [[gnu::packed, gnu::may_alias]] Word {
    uint64_t value;
  };
  uint64_t bits;
  uint64_t address;
  asm("shrx %1, %2, %0" : "=r"(address) : "r"(three), "r"(position));
  uint64_t within;  // the intrinsic's count is of 32 bits: compilers would keep a second 3 for it, in memory
  asm("bzhi %1, %2, %0" : "=r"(within) : "r"(three), "r"(position) : "cc");
  asm("shrx %1, %2, %0" : "=r"(bits) : "r"(within), "m"(*reinterpret_cast<const Word*>(address)));
  return bits;
}

#else

template <size_t kOffset>
inline uint64_t load_u8(const void* base, uint64_t index) {
  return static_cast<const uint8_t*>(base)[kOffset + index * 8];
}

template <size_t kOffset>
inline uint64_t load_u16(const void* base, uint64_t index) {
  uint16_t value;
  std::memcpy(&value, static_cast<const uint8_t*>(base) + kOffset + index * 8, sizeof value);
  return value;
}

template <size_t kOffset>
inline uint32_t load_u32(const void* base, uint64_t index) {
  uint32_t value;
  std::memcpy(&value, static_cast<const uint8_t*>(base) + kOffset + index * 8, sizeof value);
  return value;
}

template <size_t kOffset>
inline uint64_t add_u32(uint64_t value, const void* base, uint64_t index) {
  return value + load_u32<kOffset>(base, index);
}

inline uint64_t bits_at(uint64_t position, uint64_t) {
  return load64(reinterpret_cast<const uint8_t*>(position >> 3)) >> (position & 7);
}

#endif

// A steered look-up starts `steer` entries up and takes the next kBits bits as its index, or none.
template <int kBits>
[[gnu::always_inline]] inline uint64_t steered(uint64_t bits, uint64_t steer) {
#ifdef CXRFAST_INFLATE_BMI2
  return _bzhi_u64(bits, static_cast<unsigned>(steer));
#else
  return bits & ((1 << kBits) - 1) & (0 - steer);
#endif
}

// Copies kMaxCopy bytes (and may write 8 more) whose source reaches into them: the last bytes repeat with the period
// `distance` <= kMaxCopy.
[[gnu::always_inline]] inline void copy_pattern(uint8_t* to, uint64_t distance) {
#ifdef CXRFAST_INFLATE_BMI2
  const __m128i source = _mm_loadu_si128(reinterpret_cast<const __m128i*>(to - distance));
  const __m128i repeat = _mm_load_si128(reinterpret_cast<const __m128i*>(kRepeat[distance - 1]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(source, repeat));
#else
  if (distance >= 8) {
    std::memcpy(to, to - distance, 8);
    std::memcpy(to + 8, to + 8 - distance, 8);
    return;
  }
  const uint64_t once = load64(to - distance) & ((uint64_t{1} << 8 * distance) - 1);
  uint64_t repeated = once;
  for (uint64_t filled = distance; filled < 8; filled *= 2) repeated |= repeated << 8 * filled;
  const uint64_t whole = 8 / distance * distance;  // periods that fit
  for (size_t i = 0; i < 3; ++i) std::memcpy(to + i * whole, &repeated, 8);
#endif
}

// One step of stream k. See Note [a step]. False: it stops, and stopped_ret says why.
template <int k>
[[gnu::always_inline]] inline bool step(const Stream* streams, uint64_t& position, uint8_t*& out, uint64_t three,
                                        uint64_t index_bits, Stopped& stopped_ret) {
  constexpr size_t kLiterals = k * sizeof(Stream) + offsetof(Stream, literals);
  constexpr size_t kDistances = k * sizeof(Stream) + offsetof(Stream, distances);
  uint64_t bits = bits_at(position, three);
#ifdef CXRFAST_INFLATE_BMI2
  const uint64_t a = _bzhi_u64(bits, static_cast<unsigned>(index_bits));
#else
  const uint64_t a = bits & ((1 << kIndexBits) - 1);
  (void)index_bits;
#endif
  constexpr size_t kA = kLiterals + kSteer * 8;
  uint64_t used = load_u8<kA + 4>(streams, a);
  if (used == 0) [[unlikely]] {
#ifdef CXRFAST_INFLATE_BMI2
    // Most of these are literals with long codes; they are not worth a stop.
    unsigned length = 0;
    const int symbol = streams[k].literal_code.decode(bits, length);
    if (static_cast<unsigned>(symbol) < kEndOfBlock) {
      *out++ = static_cast<uint8_t>(symbol);
      position += length;
      return true;
    }
#endif
    stopped_ret = {Stop::kSymbol, k, 0};
    return false;
  }
  const uint32_t a_literals = load_u32<kA>(streams, a);
  std::memcpy(out, &a_literals, 4);
  bits >>= used & 63;
  uint8_t* to = out + load_u8<kA + 3>(streams, a);
  uint64_t length = load_u8<kA + 5>(streams, a);

  const uint64_t b_steer = load_u8<kA + 6>(streams, a);
  const uint64_t* b_from = reinterpret_cast<const uint64_t*>(streams) + b_steer;
  const uint64_t b = steered<kIndexBits>(bits, b_steer);
  const uint32_t b_literals = load_u32<kLiterals>(b_from, b);
  std::memcpy(to, &b_literals, 4);
  const uint64_t b_used = load_u8<kLiterals + 4>(b_from, b);
  bits >>= b_used & 63;
  used += b_used;
  length += load_u8<kLiterals + 5>(b_from, b);
  to += load_u8<kLiterals + 3>(b_from, b);

  const uint64_t d_steer = load_u8<kLiterals + 7>(b_from, b);
  const uint64_t* d_from = reinterpret_cast<const uint64_t*>(streams) + d_steer;
  const uint64_t d = steered<kDistanceIndexBits>(bits, d_steer);
  const uint64_t where = load_u16<kDistances + 4>(d_from, d);
#ifdef CXRFAST_INFLATE_BMI2
  const uint64_t extra = __bextr_u64(bits, where);
#else
  const uint64_t extra = bits >> (load_u8<kDistances + 7>(d_from, d) & 63) & where;
#endif
  const uint64_t distance = add_u32<kDistances>(extra, d_from, d);
  const uint64_t from = reinterpret_cast<uint64_t>(to) - distance;
  const uint64_t d_used = load_u8<kDistances + 6>(d_from, d);
  if (static_cast<int64_t>(from) < reinterpret_cast<int64_t>(streams[k].out_begin)) [[unlikely]] {
    const uint64_t true_distance = distance % kAbsurdDistance;
    if (length > 0) {
      if (true_distance == 0 || true_distance > static_cast<uint64_t>(to - streams[k].out_begin)) {
        stopped_ret = {Stop::kMatch, k, length};
        position += used;
        out = to;
        return false;
      }
      copy_pattern(to, true_distance);
    }
    out = to + length;
    position += used + d_used;
    return true;
  }
  std::memcpy(to, reinterpret_cast<const uint8_t*>(from), kMaxCopy);
  out = to + length;
  position += used + d_used;
  return true;
}

// Takes up to `steps` > 0 steps of each stream.
template <size_t... k>
[[gnu::noinline]] Stopped take_steps(Stream* streams, uint64_t steps, std::index_sequence<k...>) {
  uint64_t position[] = {streams[k].position...};
  uint8_t* out[] = {streams[k].out...};
  Stopped stopped = {Stop::kSteps, 0, 0};
  uint64_t three = 3, index_bits = kIndexBits;
#ifdef CXRFAST_INFLATE_BMI2
  // Known to be constants, they would become copies and masks again.
  asm("" : "+r"(three), "+r"(index_bits));
#endif
  while ((step<k>(streams, position[k], out[k], three, index_bits, stopped) && ...) && --steps > 0) {
  }
  ((streams[k].position = position[k], streams[k].out = out[k]), ...);
  return stopped;
}

// Runs K streams together until one of them ends; returns its number.
template <int K>
int run_until_one_ends(Stream* streams, Outcome& outcome_ret) {
  for (;;) {
    uint64_t steps = streams[0].safe_steps();
    int shortest = 0;
    for (int k = 1; k < K; ++k) {
      const uint64_t own = streams[k].safe_steps();
      if (own < steps) {
        steps = own;
        shortest = k;
      }
    }
    Stopped stopped = {Stop::kSymbol, shortest, 0};
    if (steps > 0) stopped = take_steps(streams, steps, std::make_index_sequence<K>());
    bool moved = false;
    for (int k = 0; k < K; ++k) {
      if (streams[k].out < streams[k].due) continue;
      streams[k].hand_over();
      moved = true;
    }
    if (stopped.why == Stop::kSteps || (moved && steps == 0)) continue;
    Stream& stream = streams[stopped.stream];
    Outcome outcome = Outcome::kContinue;
    if (stopped.why == Stop::kMatch) {
      outcome = stream.match(stopped.length);
    } else {
      outcome = stream.symbol();
    }
    if (outcome != Outcome::kContinue) {
      outcome_ret = outcome;
      return stopped.stream;
    }
  }
}

template <size_t... k>
int run_until_one_ends(Stream* streams, int running, Outcome& outcome_ret, std::index_sequence<k...>) {
  int ended = 0;
  ((running == k + 1 ? void(ended = run_until_one_ends<k + 1>(streams, outcome_ret)) : void()), ...);
  return ended;
}

void run_streams(InflateFeed& feed) {
  Stream streams[kInflateStreams];
  int running = 0;
  bool more = true;
  const auto end_job = [&feed](InflateJob& job, Outcome outcome) {
    if (outcome == Outcome::kFinished) {
      job.status = Status{};
    } else {
      inflate_carefully(feed, job);
    }
    feed.finished(job);
  };
  for (;;) {
    while (more && running < kInflateStreams) {
      InflateJob* job = feed.next();
      if (job == nullptr) {
        more = false;
        break;
      }
      const Outcome outcome = streams[running].start(*job, feed);
      if (outcome == Outcome::kContinue) {
        ++running;
      } else {
        if (outcome == Outcome::kFinished) streams[running].hand_over_rest();
        end_job(*job, outcome);
      }
    }
    if (running == 0) return;
    Outcome outcome = Outcome::kContinue;
    const int ended = run_until_one_ends(streams, running, outcome, std::make_index_sequence<kInflateStreams>());
    InflateJob& job = *streams[ended].job;
    if (outcome == Outcome::kFinished) streams[ended].hand_over_rest();
    --running;
    if (ended != running) streams[ended] = streams[running];
    end_job(job, outcome);
  }
}
