// inflate_kernel.h - the fast inflate, compiled once for each instruction set: inflate_portable.cpp, inflate_avx2.cpp.
//
// The including file opens an anonymous namespace, says what the CPU has (CXRFAST_INFLATE_BMI2), includes this, and
// calls run_streams. Everything here may give up at any point (kFailed): inflate.cpp then asks the careful decoder.
//
// Note [a step]
// A step of one stream is straight-line code: two look-ups in the literal table, one in the distance table, one copy of
// 16 bytes; every part happens whether it is needed or not, because half-predictable branches cost more than idle work.
// A literal entry holds up to three literals and perhaps the length behind them. What must not happen:
// - after a length, the second look-up counts as an empty entry;
// - without a length, the distance look-up goes to a neutral entry: no bits, a harmless distance; stale bytes are then
//   copied to where the next step writes, and the length 0 makes nothing of it.
// Three branches are left, all rarely taken:
// - An empty entry at the first look-up: a code (or the extra bit of a length up to 16) beyond the index. There are
//   entries by kTableBits bits for these; what is empty there, too, is left to Stream::symbol (the block's end).
// - A length above 16: its extra bits are taken, and the copy goes on.
// - A source before the start of the output. Either the file is broken; or the neutral distance reaches back too far
//   at the very start; or the entry's distance was made absurd on purpose. The rest of an absurd distance is the true
//   one, so short that the copy would overlap itself (copy_pattern), or 0 for a code longer than the index: there are
//   tables for kLongDistanceBits more; Stream::match decides the rest.
//
// Note [where a stream is]
// The position is one number, the address in bits, so that a stream needs few registers. A step takes at most kStepBits
// and writes at most kStepNbytes; the number of steps that are safe for every stream is computed before them, so the
// steps themselves check nothing, read inside the input and write inside the output.

// Behind the literal table: entries for the codes beyond the index, by kTableBits bits, the first one highest; behind
// those, one that is always empty.
constexpr int kTableBits = 14;  // hardly any code is longer
constexpr size_t kMostOfOne = size_t{1} << (kTableBits - kIndexBits - 1), kLongRoom = kLiteralSymbols * kMostOfOne;
constexpr size_t kNoLong = kLongRoom + kMostOfOne;
constexpr size_t kEntries = (size_t{1} << kIndexBits) + kNoLong + 1;

constexpr int kLongDistanceBits = 4;
constexpr int kStepBits = kTableBits + kIndexBits + kMaxLengthExtra + kDistanceIndexBits + kLongDistanceBits + 13;
static_assert(kStepBits - kMaxLengthExtra - kLongDistanceBits + kIndexBits <= 64 - 7 && kStepBits <= 64 - 7,
              "one load must be enough for a step and the next one's index; behind what is rare there is another");
static_assert(kTableBits + kIndexBits + kMaxLengthExtra < 32, "the bits that a step uses before its distance");
constexpr size_t kStepNbytes = 2 * kMaxLiterals + kMaxCopy;
// Behind a length the assembly stores the second literals, which are none then, wherever the move's upper byte says.
static_assert(kMaxLiterals + 255 + 4 <= kInflatePad);
static_assert(kStepNbytes + 8 <= 32 && kStepBits <= 64,
              "what Stream::safe_steps divides by; copy_pattern may write 8 more");

// A distance entry: bits 0-31 base   32-47 where the extra bits are, for BEXTR, or a mask   48-55 bits used, extra
// included   56-63 code length
constexpr int kExtraShift = 32, kDistanceUsedShift = 48, kDistanceCodeShift = 56;
constexpr size_t kNeutral = 1 << kDistanceIndexBits;
// The neutral distance: far enough back that its bytes have left the store queue.
constexpr uint64_t kNoDistance = 128;
// Instead of a distance, or, twice that, added to one; no output that comes here is as long.
constexpr uint64_t kAbsurdDistance = uint64_t{1} << 30, kNearDistance = 2 * kAbsurdDistance;
constexpr uint64_t kMaxFastNbytes = kAbsurdDistance;

// A code that CanonicalCode accepts has two symbols at least behind each index that is too short for them.
constexpr size_t kLongDistanceTables = kDistanceSymbols / 2;

// What does not depend on the code, by symbol; what each bit of the code adds.
constexpr auto kDistanceEntries = [] {
  std::array<uint64_t, kMaxDynamicDistanceSymbols> entries{};
  for (size_t s = 0; s < entries.size(); ++s) {
    const uint64_t extra_bits = kDistanceExtra[s], base = kDistanceBase[s];
#ifdef CXRFAST_INFLATE_BMI2
    const uint64_t where = extra_bits << 8;
#else
    const uint64_t where = (uint64_t{1} << extra_bits) - 1;
#endif
    entries[s] = base | (base < kMaxCopy ? kNearDistance : 0) | where << kExtraShift | extra_bits << kDistanceUsedShift;
  }
  return entries;
}();
#ifdef CXRFAST_INFLATE_BMI2
constexpr uint64_t kDistanceEntryOfBit =
    uint64_t{1} << kExtraShift | uint64_t{1} << kDistanceUsedShift | uint64_t{1} << kDistanceCodeShift;
#else
constexpr uint64_t kDistanceEntryOfBit = uint64_t{1} << kDistanceUsedShift | uint64_t{1} << kDistanceCodeShift;
#endif

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
  uint16_t count[kMaxCodeBits + 1];     // [l]: codes of l bits; [0] = 0
  uint16_t literals[kMaxCodeBits + 1];  // [l]: those of symbols below 256, which come before the others
  int32_t shift_to_index[kMaxCodeBits + 1];
  uint16_t symbol[2 * kLiteralSymbols];  // in the order of their codes; room for more behind them

  // False for a set that the careful decoder must look at: over-subscribed, or incomplete unless it is one code of one
  // bit or none.
  bool build(const uint8_t* bits, int symbols, Isa isa) {
    last[0] = INT16_MAX;
    count[0] = literals[0] = 0;
    shift_to_index[0] = 0;
#ifdef CXRFAST_INFLATE_BMI2
    if (isa == Isa::kAvx512) {
      order_symbols_avx512(bits, symbols, symbol, count, literals);
      return set_ranges();
    }
#endif
    (void)isa;
    // Counters of their own for each quarter of the symbols: a counter that was just written is slow to read.
    constexpr int kParts = 4;
    const int part = symbols / kParts;
    uint16_t counts[kParts][kMaxCodeBits + 1] = {};
    const auto each_symbol = [&](auto count_one) {
      for (int s = 0; s < part; ++s) {
        for (int p = 0; p < kParts; ++p) count_one(p, p * part + s);
      }
      for (int s = kParts * part; s < symbols; ++s) count_one(kParts - 1, s);
    };
    each_symbol([&](int p, int s) { ++counts[p][bits[s]]; });
    uint16_t index = 0, unused = kLiteralSymbols;
    for (int p = 0; p < kParts; ++p) unused = static_cast<uint16_t>(unused + std::exchange(counts[p][0], unused));
    for (int length = 1; length <= kMaxCodeBits; ++length) {
      const uint16_t before = index;
      for (int p = 0; p < kParts; ++p) index = static_cast<uint16_t>(index + std::exchange(counts[p][length], index));
      count[length] = static_cast<uint16_t>(index - before);
    }
    if (!set_ranges()) return false;
    each_symbol([&](int p, int s) { symbol[counts[p][bits[s]]++] = static_cast<uint16_t>(s); });
    const uint16_t* end = symbol;
    for (int length = 1; length <= kMaxCodeBits; ++length) {
      end += count[length];
      int others = 0;
      while (others < count[length] && end[-1 - others] >= kEndOfBlock) ++others;
      literals[length] = static_cast<uint16_t>(count[length] - others);
    }
    return true;
  }

  // What follows from the counts; what build returns.
  bool set_ranges() {
    uint32_t code = 0;
    int index = 0;
    for (int length = 1; length <= kMaxCodeBits; ++length) {
      shift_to_index[length] = index - static_cast<int32_t>(code >> (kMaxCodeBits - length));
      index += count[length];
      code += uint32_t{count[length]} << (kMaxCodeBits - length);
      if (code > 1u << kMaxCodeBits) return false;
      last[length] = static_cast<int16_t>(code - 1);
    }
    return code == 1u << kMaxCodeBits || index == 0 || (index == 1 && count[1] == 1);
  }

  // How many codes have from `first` to `last_length` bits.
  int codes(int first, int last_length) const { return std::accumulate(count + first, count + last_length + 1, 0); }

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

enum class Outcome : uint8_t { kContinue, kFinished, kFailed, kWantedWhole };

// A length's extra bits, by symbol; of a literal 0, of what is neither more than any table holds.
constexpr auto kExtraBits = [] {
  std::array<uint8_t, kLiteralSymbols> bits{};
  for (int s = kEndOfBlock; s < kLiteralSymbols; ++s) {
    const int which = s - kFirstLength;
    bits[static_cast<size_t>(s)] = which >= 0 && which < kLengthSymbols ? kLengthExtra[which] : kMaxCodeBits;
  }
  return bits;
}();

struct Entry {
  uint16_t move;
  uint32_t text;
};

// Places in a table of entries.
struct Entries {
  uint16_t* moves;
  uint32_t* texts;

  Entries operator+(size_t n) const { return {moves + n, texts + n}; }
  Entry operator[](size_t i) const { return {moves[i], texts[i]}; }
  void set(size_t i, Entry entry) const {
    moves[i] = entry.move;
    texts[i] = entry.text;
  }
};

struct Stream {
  // See Note [a step].
  alignas(64) uint16_t moves[kEntries];
  alignas(64) uint32_t texts[kEntries];
  // [kNeutral]: neutral. Behind it the long tables, the first of them for the indexes that have none.
  alignas(64) uint64_t distances[kNeutral + 1 + (1 + kLongDistanceTables) * (1 << kLongDistanceBits)];
  alignas(64) uint16_t long_distance_at[1 << kDistanceIndexBits];
  uint64_t long_start;  // the first code beyond the index, in kTableBits bits, the first one highest

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
  bool wanted_whole;  // by segments no more
  Isa isa;            // of the checksum and the tables
  InflateJob* job;
  InflateFeed* feed;
  CanonicalCode literal_code, distance_code;

  // The entry of what starts at the lowest bit, if its code is beyond the index.
  size_t long_entry(uint64_t bits) const {
    const uint64_t behind = (code_bits(bits) >> (kMaxCodeBits - kTableBits)) - long_start;
    return (size_t{1} << kIndexBits) + (behind < kLongRoom ? behind : kNoLong);
  }

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

  Outcome start(InflateJob& next, InflateFeed& from, Isa level) {
    job = &next;
    feed = &from;
    isa = level;
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
    distances[kNeutral] = kNoDistance;
    Entries{moves, texts}.set((size_t{1} << kIndexBits) + kNoLong, {0, 0});
    last_block = wanted_whole = false;
    return next_block();
  }

  // left_nbytes: of the output, from `out` on.
  void set_out_end(size_t left_nbytes) {
    const size_t room = static_cast<size_t>(due - out) + (job->segment_nbytes > 0 ? kSegmentOvershoot : 0);
    out_end = out + std::min(left_nbytes, room);
    later_nbytes = left_nbytes - static_cast<size_t>(out_end - out);
  }

  void hand_over(const uint8_t* bytes, size_t nbytes) {
    wanted_whole = wanted_whole || !feed->segment(*job, bytes, nbytes);
  }

  // Hands over the segments that are complete; the window slides along, so that there is room for a match again.
  void hand_over() {
    while (out >= due) {
      const size_t nbytes = job->segment_nbytes, left_nbytes = later_nbytes + static_cast<size_t>(out_end - out);
      add_to_sum();
      hand_over(due - nbytes, nbytes);
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
    if (job->segment_nbytes > 0 && out > begin) hand_over(begin, static_cast<size_t>(out - begin));
  }

  void add_to_sum() {
    adler = adler32(adler, summed, static_cast<size_t>(out - summed), isa);
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
    uint8_t literal_bits[kLiteralSymbols], distance_bits[kDistanceSymbols];
    for (int s = 0; s < kLiteralSymbols; ++s) literal_bits[s] = fixed_literal_bits(s);
    literal_code.build(literal_bits, kLiteralSymbols, isa);
    std::memset(distance_bits, kFixedDistanceBits, kDistanceSymbols);
    distance_code.build(distance_bits, kDistanceSymbols, isa);
    fill_literals(literal_bits);
    fill_distances(distance_bits, kDistanceSymbols);
    return true;
  }

  bool dynamic_codes() {
    const int literal_count = static_cast<int>(take(5)) + kFirstLength, distance_count = static_cast<int>(take(5)) + 1;
    const int length_codes = static_cast<int>(take(4)) + 4;
    if (literal_count > kMaxDynamicLiteralSymbols || distance_count > kMaxDynamicDistanceSymbols) return false;
    uint8_t length_bits[kLengthCodeSymbols] = {};
    {
      uint64_t sent = peek();  // 19 * 3 = 57 bits
      for (int i = 0; i < length_codes; ++i, sent >>= 3) length_bits[kLengthCodeOrder[i]] = sent & 7;
      position += static_cast<uint64_t>(length_codes) * 3;
    }
    alignas(64) LengthEntry length_codes_of[1 << kMaxLengthCodeBits];
    if (!fill_length_code(length_bits, length_codes_of)) return false;

    // No branches but the end's, for repetitions come irregularly; and the next word is loaded before it is known how
    // far the last one reached.
    const int total = literal_count + distance_count;
    uint8_t bits[kMaxDynamicLiteralSymbols + kMaxDynamicDistanceSymbols + kMaxRepeat + 8] = {};
    const uint8_t* next = reinterpret_cast<const uint8_t*>(position >> 3);
    uint64_t sent = load64(next) >> (position & 7);
    unsigned held = 64 - static_cast<unsigned>(position & 7);
    next += 8;
    if (length_codes_of[sent % std::size(length_codes_of)].symbols[0] == kFirstRepeat) return false;
    int i = 0;
    LengthEntry found{};
    uint64_t before = 0;
    for (;;) {
      for (int k = 0; k < 4 && i < total; ++k) {  // of up to 14 bits
        const size_t at = sent % std::size(length_codes_of);
        const unsigned used = length_codes_of[at].used;
        found = length_codes_of[at];
        const RepeatOf& of = kRepeatOf[found.symbols[0]];
        const unsigned count = found.count + static_cast<unsigned>(low_bits(sent, used) >> (used - of.extra_bits));
        uint16_t symbols;
        std::memcpy(&symbols, found.symbols, 2);
        const uint64_t itself = symbols & of.itself;
        before = (before & of.before) | (itself >> (found.count / 2 * 8 & 8) & 255) * 0x0101010101010101;
        // More than seven are zeros.
        const uint64_t kept = low_bits(itself | (before & of.before), 8 * count % 64);
        std::memcpy(bits + i, &kept, 8);
        i += static_cast<int>(count);
        sent >>= used;
        held -= used;
      }
      position = reinterpret_cast<uint64_t>(next) * 8 - held;
      if (position > end) return false;
      if (i >= total) break;
      sent |= load64(next) << held;
      next += (63 - held) / 8;
      held |= 56;
    }
    if (i > total) {
      if (found.symbols[0] >= kFirstRepeat) return false;
      position -= length_bits[found.symbols[1]];  // of a pair only the first one is meant
    }
    if (position > end || bits[kEndOfBlock] == 0 || !literal_code.build(bits, literal_count, isa) ||
        !distance_code.build(bits + literal_count, distance_count, isa)) {
      return false;
    }
    fill_literals(bits);
    fill_distances(bits + literal_count, distance_count);
    return true;
  }

  // False unless the code is complete.
  bool fill_length_code(const uint8_t* length_bits, LengthEntry* table) const {
#ifdef CXRFAST_INFLATE_BMI2
    if (isa == Isa::kAvx512) return fill_length_code_avx512(length_bits, table);
#endif
    CanonicalCode code;
    if (!code.build(length_bits, kLengthCodeSymbols, isa) || !code.complete()) return false;
    fill_by_doubling<kMaxLengthCodeBits>(code, table, [](int symbol, int length) {
      const RepeatOf& of = kRepeatOf[static_cast<size_t>(symbol)];
      return LengthEntry{{static_cast<uint8_t>(symbol), 0}, static_cast<uint8_t>(length + of.extra_bits), of.count};
    });
    return true;
  }

  // The codes of up to kBits bits, for all values of the next kBits bits: one bit more repeats what is known so far.
  // [0] says what stands where there is none.
  template <int kBits, typename T, typename EntryOf>
  [[gnu::always_inline]] static void fill_by_doubling(const CanonicalCode& code, T* table, EntryOf entry_of) {
    const uint16_t* symbol = code.symbol;
    uint32_t next = 0;
    for (int length = 1; length <= kBits; ++length) {
      const size_t known = size_t{1} << (length - 1);
      std::memcpy(table + known, table, known * sizeof(T));
      for (int i = 0; i < code.count[length]; ++i, ++symbol, next += 1u << (kMaxCodeBits - length)) {
        table[code_bits(next)] = entry_of(*symbol, length);
      }
    }
  }

  // Note [the literal table]
  // In an index whose first bit is the highest, a symbol's entries lie side by side, and they are that symbol followed
  // by what the remaining m bits say: known[m], a smaller table of the same kind, whose entries are empty where no
  // whole symbol is known. So every table is made of runs of smaller ones, by vector instructions; at the end the
  // largest is brought into the order in which the bits arrive, lowest first.
  void fill_literals(const uint8_t* bits) {
    alignas(64) uint16_t known_moves[2 << kIndexBits];
    alignas(64) uint32_t known_texts[2 << kIndexBits];
    const Entries tables = {known_moves, known_texts};  // known[m] at 2^m
    int shortest = 1;
    while (shortest < kIndexBits && literal_code.count[shortest] == 0) ++shortest;
#ifdef CXRFAST_INFLATE_BMI2
    if (isa == Isa::kAvx512 && shortest >= kShortestAvx512) {
      fill_literals_avx512(bits, literal_code.symbol, literal_code.codes(1, kIndexBits), moves, texts);
      return fill_long(bits);
    }
#endif
    for (int m = 0; m <= kIndexBits - shortest; ++m) fill_known(tables, m, shortest, bits);
    fill_known(tables, kIndexBits, shortest, bits);
    reverse_index(tables + (size_t{1} << kIndexBits));
    fill_long(bits);
  }

  // The tables for indexes whose first bit is the lowest. Of an index abc (a and c of as many bits as a vector has
  // elements), b reversed is one of several places, and a and c are row and column of a matrix that is transposed.
  void reverse_index(Entries from) {
    reverse_index(from.moves, moves);
    reverse_index(from.texts, texts);
  }

  // Elements of a and b in turns, half of them, from the element `first` on.
  template <size_t first, typename Row, size_t... i>
  [[gnu::always_inline]] static Row interleave(Row a, Row b, std::index_sequence<i...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * sizeof...(i))...);
#else
    return __builtin_shuffle(a, b, Row{(first + i / 2 + i % 2 * sizeof...(i))...});
#endif
  }

  template <typename T>
  static void reverse_index(const T* from, T* to) {
    typedef T Row __attribute__((vector_size(16)));
    constexpr size_t kRow = 16 / sizeof(T);
    constexpr std::make_index_sequence<kRow> kElements;
    constexpr int kRowBits = kRow == 8 ? 3 : 2;
    constexpr auto kReversedRow = reversed_bits<kRowBits>();
    constexpr auto kReversedMiddle = reversed_bits<kIndexBits - 2 * kRowBits>();
    constexpr size_t kStride = size_t{1} << (kIndexBits - kRowBits);
    for (size_t b = 0; b < kReversedMiddle.size(); ++b) {
      Row rows[kRow], next[kRow];
      for (size_t a = 0; a < kRow; ++a) std::memcpy(&rows[a], from + kReversedRow[a] * kStride + b * kRow, sizeof(Row));
      for (int round = 0; round < kRowBits; ++round) {
        for (size_t a = 0; a < kRow / 2; ++a) {
          next[2 * a] = interleave<0>(rows[a], rows[a + kRow / 2], kElements);
          next[2 * a + 1] = interleave<kRow / 2>(rows[a], rows[a + kRow / 2], kElements);
        }
        std::copy(next, next + kRow, rows);
      }
      for (size_t c = 0; c < kRow; ++c) {
        std::memcpy(to + kReversedRow[c] * kStride + kReversedMiddle[b] * kRow, &rows[c], sizeof(Row));
      }
    }
  }

  void fill_known(Entries tables, int m, int shortest, const uint8_t* bits) const {
    Entries to = tables + (size_t{1} << m);
    const uint16_t* const to_end = to.moves + (size_t{1} << m);
    const uint16_t* symbol = literal_code.symbol;
    const bool too_many = shortest * (kMaxLiterals + 1) <= m;
    for (int length = 1; length <= m; ++length) {
      const size_t run = size_t{1} << (m - length);
      const Entries from = tables + run;
      const uint16_t* const group_end = symbol + literal_code.count[length];
      const uint16_t* const literals_end = symbol + literal_code.literals[length];
      if (too_many) {
        for (; symbol < literals_end; ++symbol, to = to + run) {
          for (size_t k = 0; k < run; ++k) {
            to.set(k, prefixed(without_fourth(from[k], bits), literal_entry(*symbol, length)));
          }
        }
      } else if (run == 1) {
        to = fill_runs<1>(to, from, symbol, literals_end, length);
      } else if (run == 2) {
        to = fill_runs<2>(to, from, symbol, literals_end, length);
      } else if (run == 4) {
        to = fill_runs<4>(to, from, symbol, literals_end, length);
      } else {
        for (size_t k = 0; k < run; k += 8) fill_runs<8>(to + k, from + k, symbol, literals_end, length, run);
        to = to + run * static_cast<size_t>(literals_end - symbol);
      }
      for (symbol = literals_end; symbol < group_end; ++symbol, to = to + run) {
        fill_length(to, run, *symbol, length, m);
      }
    }
    fill_run(to, static_cast<size_t>(to_end - to.moves), {0, 0});
  }

  // kRun entries of each literal, what `from` knows behind it, and `stride` entries on those of the next literal.
  template <size_t kRun>
  static Entries fill_runs(Entries to, Entries from, const uint16_t* symbol, const uint16_t* symbol_end, int length,
                           size_t stride = kRun) {
    uint16_t move[kRun];  // the same for all literals of a length
    uint32_t behind[kRun];
    for (size_t k = 0; k < kRun; ++k) {
      const Entry entry = prefixed(from[k], literal_entry(0, length));
      move[k] = entry.move;
      behind[k] = entry.text;
    }
    for (; symbol < symbol_end; ++symbol, to = to + stride) {
      std::memcpy(to.moves, move, sizeof move);
      for (size_t k = 0; k < kRun; ++k) to.texts[k] = behind[k] + *symbol;
    }
    return to;
  }

  static Entry literal_entry(uint32_t literal, int bits) {
    return {static_cast<uint16_t>((1 << kCountShift) + bits), literal};
  }

  // Of a length up to kMaxCopy, all its bits within the index; of any other one, or none.
  static Entry length_entry(size_t length, int bits) {
    return {static_cast<uint16_t>(((0 - length) << kMoveLengthShift) + static_cast<size_t>(bits)),
            static_cast<uint32_t>((kMaxMatch - length) << kTextLengthShift)};
  }
  static Entry long_length_entry(int symbol, int bits) {
    const int extra_bits = kExtraBits[static_cast<size_t>(symbol)];
    if (extra_bits > kMaxLengthExtra) return {0, 0};  // no length
    const auto least = static_cast<uint32_t>(kMaxMatch - kLengthBase[symbol - kFirstLength]);
    return {static_cast<uint16_t>(kLongLength + bits + extra_bits),
            least << kTextLengthShift | static_cast<uint32_t>(extra_bits << 8 | bits)};
  }

  // The entry, or its first two literals if it has three: with one more in front there is room for no other.
  static Entry without_fourth(Entry entry, const uint8_t* bits) {
    if ((entry.move >> kCountShift & kCountMask) < kMaxLiterals) return entry;
    if (entry.move >> kMoveLengthShift != 0) return {0, 0};  // how many bits its length had is not known any more
    return {static_cast<uint16_t>(entry.move - (1 << kCountShift) - bits[entry.text >> 16 & 255]), entry.text};
  }

  // A literal in front of what there is room for behind it.
  static Entry prefixed(Entry entry, Entry literal) {
    constexpr uint32_t kMoved = 0xFFFF00, kLength = uint32_t{255} << kTextLengthShift;
    return {static_cast<uint16_t>(entry.move + literal.move),
            (entry.text << 8 & kMoved) + (entry.text & kLength) + literal.text};
  }

  // m < kIndexBits: for what stands behind a literal.
  static void fill_length(Entries to, size_t run, int symbol, int length, int m) {
    const int extra_bits = kExtraBits[static_cast<size_t>(symbol)];
    if (symbol >= kFirstLong || length + extra_bits > m) {
      return fill_run(to, run, m < kIndexBits ? Entry{0, 0} : long_length_entry(symbol, length));
    }
    const size_t part = run >> extra_bits, least = kLengthBase[symbol - kFirstLength];
    for (size_t extra = 0; extra < size_t{1} << extra_bits; ++extra, to = to + part) {
      fill_run(to, part, length_entry(least + extra, length + extra_bits));  // one bit at most
    }
  }

  template <size_t kRun>
  [[gnu::always_inline]] static void fill_run(Entries to, Entry entry) {
    std::fill_n(to.moves, kRun, entry.move);
    std::fill_n(to.texts, kRun, entry.text);
  }

  // Most runs are short, so that std::fill would cost more than it stores.
  [[gnu::always_inline]] static void fill_run(Entries to, size_t run, Entry entry) {
    if (run < 8) {
      for (size_t k = 0; k < run; ++k) {
        to.set(k, entry);
        asm("" ::: "memory");  // not as a vector loop
      }
      return;
    }
    std::fill(to.moves, to.moves + run, entry.move);
    std::fill(to.texts, to.texts + run, entry.text);
  }

  void fill_long(const uint8_t* bits) {
    constexpr uint32_t kCodes = 1 << kTableBits;
    const Entries entries = Entries{moves, texts} + (size_t{1} << kIndexBits);
    const uint16_t* symbol = literal_code.symbol + literal_code.codes(1, kIndexBits);
    const uint16_t* const symbol_end = symbol + literal_code.codes(kIndexBits + 1, kTableBits);
    long_start = static_cast<uint32_t>(literal_code.last[kIndexBits] + 1) >> (kMaxCodeBits - kTableBits);
    const size_t codes = std::min<size_t>(kCodes - long_start, kLongRoom);  // more only where there are none
    size_t at = 0;
    for (; symbol < symbol_end; ++symbol) {
      const int length = bits[*symbol];
      const size_t run = size_t{1} << (kTableBits - length);
      if (*symbol < kEndOfBlock) {
        fill_run<kMostOfOne>(entries + at, literal_entry(*symbol, length));  // the next one overwrites the rest
      } else {
        fill_length(entries + at, run, *symbol, length, kTableBits);
      }
      at += run;
    }
    fill_run(entries + at, codes - at, {0, 0});
  }

  static uint64_t distance_entry(int symbol, int length) {
    return symbol < kMaxDynamicDistanceSymbols
               ? kDistanceEntries[symbol] + static_cast<uint64_t>(length) * kDistanceEntryOfBit
               : kAbsurdDistance;
  }

  // What kDistanceIndexBits bits tell. bits: of the first `symbols` distances.
  void fill_distance_index([[maybe_unused]] const uint8_t* bits, [[maybe_unused]] int symbols) {
#ifdef CXRFAST_INFLATE_BMI2
    if (isa == Isa::kAvx512) {
      alignas(64) uint64_t entries[kDistanceSymbols];
      for (int s = 0; s < kDistanceSymbols; ++s) entries[s] = distance_entry(s, s < symbols ? bits[s] : 0);
      return fill_distances_avx512(bits, distance_code.symbol, distance_code.codes(1, kDistanceIndexBits), entries,
                                   distances);
    }
#endif
    distances[0] = kAbsurdDistance;
    fill_by_doubling<kDistanceIndexBits>(distance_code, distances, distance_entry);
  }

  // bits: of the first `symbols` distances.
  void fill_distances(const uint8_t* bits, int symbols) {
    constexpr uint32_t kIndexes = 1 << kDistanceIndexBits, kLong = 1 << kLongDistanceBits;
    fill_distance_index(bits, symbols);
    std::fill(long_distance_at, long_distance_at + kIndexes, static_cast<uint16_t>(kNeutral + 1));
    size_t next_table = kNeutral + 1;
    const auto add_table = [&] {
      std::fill_n(distances + std::exchange(next_table, next_table + kLong), kLong, kAbsurdDistance);
    };
    add_table();
    const uint16_t* symbol = distance_code.symbol + distance_code.codes(1, kDistanceIndexBits);
    auto next = static_cast<uint32_t>(distance_code.last[kDistanceIndexBits] + 1);
    for (int length = kDistanceIndexBits + 1; length <= kDistanceIndexBits + kLongDistanceBits; ++length) {
      for (int i = 0; i < distance_code.count[length]; ++i, ++symbol, next += 1u << (kMaxCodeBits - length)) {
        const uint32_t code = code_bits(next);
        uint16_t& table_at = long_distance_at[code % kIndexes];
        if (table_at == kNeutral + 1) {
          table_at = static_cast<uint16_t>(next_table);
          add_table();
        }
        for (uint32_t at = code / kIndexes; at < kLong; at += 1u << (length - kDistanceIndexBits)) {
          distances[table_at + at] = distance_entry(*symbol, length);
        }
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

#ifdef CXRFAST_INFLATE_BMI2
#include "inflate_steps_bmi2.h"
#else

// Copies kMaxCopy bytes, and writes up to 8 more, whose source reaches into them: the last bytes repeat with the period
// `distance` <= kMaxCopy.
inline void copy_pattern(uint8_t* to, uint64_t distance) {
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
}

// The match of a step whose source lies before the start of the output: copies it, or false. See Note [a step].
inline bool copy_near(const Stream& stream, uint8_t* to, uint64_t distance, size_t length) {
  if (length == 0) return true;
  distance %= kAbsurdDistance;
  if (length > kMaxCopy || distance == 0 || distance > kMaxCopy ||
      distance > static_cast<uint64_t>(to - stream.out_begin)) {
    return false;
  }
  copy_pattern(to, distance);
  return true;
}

inline uint64_t distance_of(uint64_t entry, uint64_t bits) {
  return static_cast<uint32_t>(entry) + (bits >> (entry >> kDistanceCodeShift) & (entry >> kExtraShift & 0xFFFF));
}

// One step of stream k. See Note [a step]. False: it stops, and stopped_ret says why.
template <int k>
[[gnu::always_inline]] inline bool step(const Stream& stream, uint64_t& position, uint8_t*& out, uint64_t& steps,
                                        Stopped& stopped_ret) {
  const uint64_t first_bits = load64(reinterpret_cast<const uint8_t*>(position >> 3)) >> (position & 7);
  uint64_t bits = first_bits;
  size_t at = bits % (1 << kIndexBits);
  uint32_t move = stream.moves[at];
  if (move == 0) [[unlikely]] {
    at = stream.long_entry(bits);
    move = stream.moves[at];
    if (move == 0) {
      stopped_ret = {Stop::kSymbol, k, 0};
      return false;
    }
  }
  std::memcpy(out, &stream.texts[at], 4);

  const uint32_t has_length = 0 - (move >> 15);
  const size_t second_at = (bits >> (move & 31)) % (1 << kIndexBits);
  std::memcpy(out + (move >> kCountShift & kCountMask), &stream.texts[second_at], 4);
  move += stream.moves[second_at] & ~has_length;
  bits >>= move & 31;
  position += move & 31;
  uint8_t* to = out + (move >> kCountShift & kCountMask);
  size_t length = 31 & (0 - (move >> kMoveLengthShift));

  const uint64_t any = 0 - uint64_t{move >> 15};
  uint64_t found = stream.distances[((bits % (1 << kDistanceIndexBits)) & any) | (~any & kNeutral)];
  uint64_t distance = distance_of(found, bits);
  uint64_t from = reinterpret_cast<uint64_t>(to) - distance;
  if (move >= kLongLength) [[unlikely]] {
    const uint32_t text = stream.texts[has_length ? at : second_at];
    const uint64_t behind = has_length ? first_bits : first_bits >> (stream.moves[at] & 31);
    length = kMaxMatch - (text >> kTextLengthShift) + low_bits(behind >> (text & 255), text >> 8 & 255);
  }
  if (static_cast<int64_t>(from) < reinterpret_cast<int64_t>(stream.out_begin)) [[unlikely]] {
    if (found == kAbsurdDistance) {
      found = stream.distances[stream.long_distance_at[bits % (1 << kDistanceIndexBits)] +
                               (bits >> kDistanceIndexBits) % (1 << kLongDistanceBits)];
      distance = distance_of(found, bits);
      from = reinterpret_cast<uint64_t>(to) - distance;
    }
    const bool is_far = static_cast<int64_t>(from) >= reinterpret_cast<int64_t>(stream.out_begin);
    if (is_far && length <= kMaxCopy) {
      std::memcpy(to, reinterpret_cast<const uint8_t*>(from), kMaxCopy);
    } else if (is_far || !copy_near(stream, to, distance, length)) {
      out = to;
      stopped_ret = {Stop::kMatch, k, length};
      return false;
    }
  } else if (length > kMaxCopy) [[unlikely]] {
    if (to + length + 32 * steps > stream.out_end) {
      out = to;
      stopped_ret = {Stop::kMatch, k, length};
      return false;
    }
    for (size_t i = 0; i < length; i += kMaxCopy) {
      std::memcpy(to + i, reinterpret_cast<const uint8_t*>(from) + i, kMaxCopy);
    }
  } else {
    std::memcpy(to, reinterpret_cast<const uint8_t*>(from), kMaxCopy);
  }
  out = to + length;
  position += found >> kDistanceUsedShift & 63;
  return true;
}

struct Lanes {
  Stream streams[kInflateStreams];
};

template <size_t... k>
[[gnu::noinline]] Stopped take_steps(Stream* streams, uint64_t steps, std::index_sequence<k...>) {
  uint64_t position[] = {streams[k].position...};
  uint8_t* out[] = {streams[k].out...};
  Stopped stopped = {Stop::kSteps, 0, 0};
  while ((step<k>(streams[k], position[k], out[k], steps, stopped) && ...) && --steps > 0) {
  }
  ((streams[k].position = position[k], streams[k].out = out[k]), ...);
  return stopped;
}

// Takes up to `steps` > 0 steps of each of the first K streams.
template <int K>
Stopped take_steps(Lanes& lanes, uint64_t steps) {
  return take_steps(lanes.streams, steps, std::make_index_sequence<K>());
}

#endif

// Runs K streams together until one of them ends; returns its number.
template <int K>
int run_until_one_ends(Lanes& lanes, Outcome& outcome_ret) {
  Stream* const streams = lanes.streams;
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
    if (steps > 0) stopped = take_steps<K>(lanes, steps);
    bool moved = false;
    for (int k = 0; k < K; ++k) {
      if (streams[k].out < streams[k].due) continue;
      streams[k].hand_over();
      if (streams[k].wanted_whole) {
        outcome_ret = Outcome::kWantedWhole;
        return k;
      }
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
int run_until_one_ends(Lanes& lanes, int running, Outcome& outcome_ret, std::index_sequence<k...>) {
  int ended = 0;
  ((running == k + 1 ? void(ended = run_until_one_ends<k + 1>(lanes, outcome_ret)) : void()), ...);
  return ended;
}

void run_streams(InflateFeed& feed, Isa isa) {
  Lanes lanes;
  Stream* const streams = lanes.streams;
  // What follows when a stream does not continue. True: it does, for it has begun once more.
  const auto ends = [&](Stream& stream, Outcome outcome) {
    InflateJob& job = *stream.job;
    if (outcome == Outcome::kFinished) stream.hand_over_rest();
    if (outcome != Outcome::kFailed && stream.wanted_whole) {
      if (!feed.whole(job)) {
        feed.finished(job);
        return false;
      }
      job.segment_nbytes = 0;
      outcome = stream.start(job, feed, isa);
      if (outcome == Outcome::kContinue) return true;
    }
    if (outcome == Outcome::kFinished) {
      job.status = Status{};
    } else {
      inflate_carefully(feed, job);
    }
    feed.finished(job);
    return false;
  };
  // Starts a stream with the first job that does not end at once; false where there are no more jobs.
  const auto start = [&](Stream& stream) {
    while (InflateJob* job = feed.next()) {
      const Outcome outcome = stream.start(*job, feed, isa);
      if (outcome == Outcome::kContinue || ends(stream, outcome)) return true;
    }
    return false;
  };
  bool more = true;
  int running = 0;
  while (running < kInflateStreams && (more = more && start(streams[running]))) ++running;
  while (running > 0) {
    Outcome outcome = Outcome::kContinue;
    const int ended = run_until_one_ends(lanes, running, outcome, std::make_index_sequence<kInflateStreams>());
    if (ends(streams[ended], outcome)) continue;
    more = more && start(streams[ended]);
    if (!more && ended != --running) streams[ended] = streams[running];
  }
}
