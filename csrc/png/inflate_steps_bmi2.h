// inflate_steps_bmi2.h - the steps of inflate_kernel.h in assembly, included by it for x86-64 CPUs with BMI2.
//
// Compilers run out of registers over three streams, spill what the next look-up waits for, and turn selections into
// branches; each costs as much as all the instructions that it saves. So the loop is assembly, one text for each
// stream, with everything rare outside of it. See Note [a step].
//
// Note [the chain]
// A stream waits for its own look-ups, one after the other: the first literal entry, the second one, the distance. The
// bits that a step leaves over are kept for the first look-up of the next step, whose other bits are loaded meanwhile:
// 23 cycles on a core whose loads take 5. What is not on this chain should not be in its way: the moves, which are,
// take 2 bytes an entry, so that they stay in the first-level cache whatever windows and texts do to it.
//
// Note [parts in turns]
// A step is three parts, one for each look-up. With three streams the parts run in turns: the third of one stream, the
// second of the next, the first of the last, and so on. Instructions wait in the processor's queues until their
// inputs are there, and those queues are short; in this order they enter them about when they can run. A step's
// position and output are stored in registers only by its third part, so that steps under way can be given up at any
// point: they are taken again.
//
// Note [near distances]
// A copy that overlaps itself is rare in films of one byte a pixel, and a branch. Where it is not rare (pixels of
// several bytes: each third repetition in NIH's RGBA files) nobody could predict that branch. So a stream's part has a
// second form, in which every copy is a permutation of what was loaded, the same bytes unless the distance is near.
// Each stream has a Habit that chooses, and each choice a text of its own.
//
// The text is macros of the assembler, for the numbers and registers of one stream.
// Registers: rdi the lanes, kIndexBits into them, which makes its lowest byte what BZHI takes to find an index
// P position   O out   L bits that are left over, then those of this step
// rbx the first entry's move, from the first part to the second   rax the moves' sum, from the second to the third
// rcx, rdx, rbp scratch; in the third part the source, the distance's bits, minus the length

// [distance - 1]: what repeats the last `distance` bytes over a copy; how many of its bytes are whole repetitions.
struct Repeats {
  alignas(16) uint8_t none[kMaxCopy];  // [-1], as it were: the copy as it is
  uint8_t of[kMaxCopy][kMaxCopy];
  uint8_t whole[kMaxCopy];
};
constexpr Repeats kRepeats = [] {
  Repeats repeats{};
  for (size_t distance = 1; distance <= kMaxCopy; ++distance) {
    for (size_t i = 0; i < kMaxCopy; ++i) repeats.of[distance - 1][i] = static_cast<uint8_t>(i % distance);
    repeats.none[distance - 1] = static_cast<uint8_t>(distance - 1);
    repeats.whole[distance - 1] = static_cast<uint8_t>(kMaxCopy / distance * distance);
  }
  return repeats;
}();

// Whether near distances are common, as far as some dozens of steps can tell; looked at again now and then. The second
// form takes an eighth longer, a near distance in the first one as long as two steps: so it pays from one in 16 on.
struct Habit {
  bool expects_near = false;
  uint64_t steps = 0, near = 0;

  void note(uint64_t more_steps, uint64_t more_near) {
    steps += more_steps;
    near += more_near;
    if (steps < (expects_near ? 4096 : 64)) return;
    expects_near = !expects_near && 16 * near > steps;
    steps = near = 0;
  }
};

struct alignas(256) Lanes {
  Stream streams[kInflateStreams];
  uint64_t steps;  // left
  uint64_t nothing = 0;
  uint64_t neutral = kNeutral;
  uint64_t no_long = kNoLong;
  std::array<uint16_t, 256> reversed = kReversedByte;
  Repeats repeats = kRepeats;
  // Where the steps stopped.
  uint64_t why, stream, minus_length;
  // Scratch.
  uint64_t rbp, distance_bits, source;
  // Of each stream: copies that overlapped themselves, as far as they were branches.
  uint64_t near[kInflateStreams] = {};
  Habit habits[kInflateStreams];
};
static_assert(offsetof(Repeats, of) == 16 && offsetof(Lanes, near) == offsetof(Lanes, source) + 8,
              "written into the text");

// Takes up to `steps` > 0 steps of each of the first K streams.
//
// Labels, behind the stream's number: 1 long tables, 2 entry found (with a 1 or a 2 between, for the two places of a
// first part), 4 length above kMaxCopy, 5 copied, 6 source before the start, 7 stop for a match, 9 distance's entry
// found, 3 long tables of the distance, 92 none there; 93 to 96 a length above kMaxCopy is looked up again and copied;
// 97 and 98 a repetition.
// kNear: bit k says that stream k expects near distances.
template <int K, unsigned kNear>
[[gnu::noinline]] Stopped take_steps(Lanes& lanes, uint64_t steps) {
  static_assert(K <= 3 && static_cast<int>(Stop::kSteps) == 0 && static_cast<int>(Stop::kSymbol) == 1 &&
                    static_cast<int>(Stop::kMatch) == 2,
                "written into the text: there are 30 operands at most");
  static_assert(kIndexBits == 10 && kTableBits == 14 && kLongRoom == 2304 && kDistanceIndexBits == 8 &&
                    kCountShift == 8 && kCountMask == 7 && kMoveLengthShift == 11 && kTextLengthShift == 24 &&
                    kMaxMatch == 258,
                "likewise");
  constexpr size_t kBase = kIndexBits;
  lanes.steps = steps;
  asm volatile(
      R"(
  .macro peek P, P32, L, L32
    movq %%\P, %%rdx
    shrq $3, %%rdx
    movl %%\P32, %%\L32
    andl $7, %%\L32
    shrx %%\L, (%%rdx), %%\L
  .endm

  .macro load k, P, P32, O, L, L32, L8, place
    movq \k*%c[size]+%c[position](%%rdi), %%\P
    movq \k*%c[size]+%c[out](%%rdi), %%\O
    peek \P, \P32, \L, \L32
  .endm

  .macro first k, P, P32, O, L, L32, L8, place
    bzhil %%edi, %%\L32, %%ebp
    movzwl \k*%c[size]+%c[moves](%%rdi,%%rbp,2), %%ebx
    peek \P, \P32, \L, \L32
    testl %%ebx, %%ebx
    jz 1\place\k\()f
  2\place\k:
    movl \k*%c[size]+%c[texts](%%rdi,%%rbp,4), %%edx
    movl %%edx, (%%\O)
  .endm

  .macro second k, P, P32, O, L, L32, L8, place
    shrx %%rbx, %%\L, %%\L
    bzhil %%edi, %%\L32, %%edx
    movzwl \k*%c[size]+%c[moves](%%rdi,%%rdx,2), %%eax
    movzbl %%bh, %%ecx # behind a length, too much: see kInflatePad
    movl \k*%c[size]+%c[texts](%%rdi,%%rdx,4), %%edx
    movl %%edx, (%%\O,%%rcx)
    testw %%bx, %%bx
    cmovs %c[nothing](%%rdi), %%eax
    shrx %%rax, %%\L, %%\L
    addl %%ebx, %%eax
  .endm

  .macro third k, P, P32, O, L, L32, L8, place
    movzbl %%\L8, %%ebp
    movzbl %%al, %%ecx
    addq %%rcx, %%\P
    movzbl %%ah, %%ecx
    andl $7, %%ecx
    addq %%rcx, %%\O
    testw %%ax, %%ax
    cmovns %c[neutral](%%rdi), %%rbp
  9\k:
    movzbl \k*%c[size]+%c[distances]+6(%%rdi,%%rbp,8), %%edx
    movzwl \k*%c[size]+%c[distances]+4(%%rdi,%%rbp,8), %%ecx
    bextr %%rcx, %%\L, %%rcx
    shrx %%rdx, %%\L, %%\L
    addq %%rdx, %%\P
    addl \k*%c[size]+%c[distances](%%rdi,%%rbp,8), %%ecx
  .if (%c[near] >> \k) & 1
    movq %%rdx, %c[distance_bits](%%rdi)
    movl %%ecx, %%edx
    sarl $31, %%edx
    andl %%ecx, %%edx
    shll $4, %%edx
    btrl $31, %%ecx
  .endif
    movswq %%ax, %%rbp
    sarq $11, %%rbp
    negq %%rcx
    addq %%\O, %%rcx
    cmpq \k*%c[size]+%c[begin](%%rdi), %%rcx
    jl 6\k\()f
    cmpq $-1, %%rbp
    je 4\k\()f
    vmovdqu (%%rcx), %%xmm0
  .if (%c[near] >> \k) & 1
    vpshufb %c[repeats]-16(%%rdi,%%rdx), %%xmm0, %%xmm0
  .endif
    vmovdqu %%xmm0, (%%\O)
    subq %%rbp, %%\O
  5\k:
  .endm

  # rbp: where the entry is, Stream::long_entry. Uses rcx.
  .macro long_entry k, bits, bits8
    movzbl %%\bits8, %%ebp
    movl %%\bits, %%ecx
    shrl $8, %%ecx
    andl $63, %%ecx
    movzwl %c[reversed](%%rdi,%%rbp,2), %%ebp
    movzwl %c[reversed](%%rdi,%%rcx,2), %%ecx
    shll $6, %%ebp
    shrl $2, %%ecx
    orl %%ecx, %%ebp
    subl \k*%c[size]+%c[long_start](%%rdi), %%ebp
    cmpl $2303, %%ebp
    cmoval %c[no_long](%%rdi), %%ebp
    addl $1024, %%ebp
  .endm

  .macro rare_first k, P, P32, O, L, L32, L8, place
  1\place\k:
    long_entry \k, \L32, \L8
    movzwl \k*%c[size]+%c[moves](%%rdi,%%rbp,2), %%ebx
    testl %%ebx, %%ebx
    jnz 2\place\k\()b
    movl $1, %%ecx
    movl $\k, %%edx
    jmp 8f
  .endm

  .macro rare_third k, P, P32, O, L, L32, L8, place
  6\k:
    testq %%rbp, %%rbp
    jz 5\k\()b
  .ifeq (%c[near] >> \k) & 1
    movq %%rdx, %c[distance_bits](%%rdi)
  .endif
    movq %%\O, %%rdx
    subq %%rcx, %%rdx
    testl %[true_distance], %%edx
    jz 3\k\()f
  92\k:
    cmpq $-1, %%rbp
    je 93\k\()f
    movq %%\O, %%rdx
    subq %%rbp, %%rdx
    jmp 97\k\()f
  3\k:
    peek \P, \P32, \L, \L32
    movl %%\L32, %%edx
    movzbl %%\L8, %%ebp
    shrl $8, %%edx
    movzwl \k*%c[size]+%c[long_distance_at](%%rdi,%%rbp,2), %%ebp
    andl $(1 << %c[long_distance_bits]) - 1, %%edx
    addl %%edx, %%ebp
    testl %[true_distance], \k*%c[size]+%c[distances](%%rdi,%%rbp,8)
    jnz 9\k\()b
    movswq %%ax, %%rbp
    sarq $11, %%rbp
    jmp 92\k\()b
  4\k:
  .if (%c[near] >> \k) & 1
    testl %%edx, %%edx
    jz 93\k\()f
    addq $-0x80000000, %%rcx # before the start again
  .else
    movq %%rdx, %c[distance_bits](%%rdi)
  .endif
  93\k: # the length stands in the text of the step's first or second entry
    movq %%rcx, %c[source](%%rdi)
    peek \P, \P32, \L, \L32 # so many bits may not be left over
    movzbl %%al, %%edx
    movq %%\P, %%rcx
    subq %c[distance_bits](%%rdi), %%rcx
    subq %%rdx, %%rcx
    movq %%rcx, %%rdx
    shrq $3, %%rdx
    andl $7, %%ecx
    shrx %%rcx, (%%rdx), %%rdx
    bzhil %%edi, %%edx, %%ebp
    movzwl \k*%c[size]+%c[moves](%%rdi,%%rbp,2), %%ecx
    testl %%ecx, %%ecx
    jnz 94\k\()f
    long_entry \k, edx, dl
    movzwl \k*%c[size]+%c[moves](%%rdi,%%rbp,2), %%ecx
  94\k:
    testw %%cx, %%cx
    js 95\k\()f
    shrx %%rcx, %%rdx, %%rdx
    bzhil %%edi, %%edx, %%ebp
  95\k:
    movzwl \k*%c[size]+%c[texts](%%rdi,%%rbp,4), %%ecx
    bextr %%rcx, %%rdx, %%rcx
    movzbl \k*%c[size]+%c[texts]+3(%%rdi,%%rbp,4), %%ebp
    subq %%rcx, %%rbp
    subq $258, %%rbp
    # what follows still needs its 32 bytes a step
    movq %%\O, %%rdx
    subq %%rbp, %%rdx
    movq %c[steps](%%rdi), %%rax
    shlq $5, %%rax
    addq %%rdx, %%rax
    cmpq \k*%c[size]+%c[out_end](%%rdi), %%rax
    ja 7\k\()f
    movq %c[source](%%rdi), %%rcx
    cmpq \k*%c[size]+%c[begin](%%rdi), %%rcx
    jl 97\k\()f
  96\k:
    vmovdqu (%%rcx), %%xmm0
    vmovdqu %%xmm0, (%%\O)
    addq $16, %%rcx
    addq $16, %%\O
    cmpq %%rdx, %%\O
    jb 96\k\()b
    movq %%rdx, %%\O
    jmp 5\k\()b
  97\k: # rcx: the source, before the start; rdx: the copy's end. There is no distance yet where the true one is 0
    movq %%\O, %%rax
    subq %%rcx, %%rax
    andl %[true_distance], %%eax
    jz 7\k\()f
    cmpl %[copy], %%eax
    ja 7\k\()f
    addq $1, 8*\k+%c[source]+8(%%rdi)
    movq %%\O, %%rcx
    subq %%rax, %%rcx
    cmpq \k*%c[size]+%c[begin](%%rdi), %%rcx
    jl 7\k\()f
    vmovdqu (%%rcx), %%xmm0
    movzbl %c[whole]-1(%%rdi,%%rax), %%ecx
    shll $4, %%eax
    vpshufb %c[repeats]-16(%%rdi,%%rax), %%xmm0, %%xmm0
  98\k:
    vmovdqu %%xmm0, (%%\O)
    addq %%rcx, %%\O
    cmpq %%rdx, %%\O
    jb 98\k\()b
    movq %%rdx, %%\O
    jmp 5\k\()b
  7\k:
    subq %c[distance_bits](%%rdi), %%\P
    movl $2, %%ecx
    movl $\k, %%edx
    jmp 8f
  .endm

  .macro store k, P, P32, O, L, L32, L8, place
    movq %%\P, \k*%c[size]+%c[position](%%rdi)
    movq %%\O, \k*%c[size]+%c[out](%%rdi)
  .endm

  .macro stream k, part, place=1
    .if \k == 0
    \part 0, rsi, esi, r10, r13, r13d, r13b, \place
    .elseif \k == 1
    \part 1, r8, r8d, r11, r14, r14d, r14b, \place
    .else
    \part 2, r9, r9d, r12, r15, r15d, r15b, \place
    .endif
  .endm

  .macro streams part
    stream 0, \part
    .if %c[count] > 1
    stream 1, \part
    .endif
    .if %c[count] > 2
    stream 2, \part
    .endif
  .endm

  .macro step k, P, P32, O, L, L32, L8, place
    stream \k, first
    stream \k, second
    stream \k, third
  .endm

    movq %%rbp, %c[rbp](%%rdi)
    streams load
  .if %c[count] == 3
    stream 0, first, 2
    stream 0, second
    stream 1, first, 2
    .p2align 6
  0:
    stream 0, third
    stream 1, second
    stream 2, first
    stream 1, third
    stream 2, second
    stream 0, first
    stream 2, third
    stream 0, second
    stream 1, first
  .else
    .p2align 6
  0:
    streams step
  .endif
    subq $1, %c[steps](%%rdi)
    jnz 0b
    xorl %%ecx, %%ecx
    jmp 8f
    streams rare_first
    streams rare_third
  .if %c[count] == 3
    stream 0, rare_first, 2
    stream 1, rare_first, 2
  .endif
  8:
    streams store
    movq %%rcx, %c[why](%%rdi)
    movq %%rdx, %c[stream](%%rdi)
    movq %%rbp, %c[minus_length](%%rdi)
    movq %c[rbp](%%rdi), %%rbp

  .purgem peek
  .purgem load
  .purgem first
  .purgem second
  .purgem third
  .purgem long_entry
  .purgem rare_first
  .purgem rare_third
  .purgem store
  .purgem stream
  .purgem streams
  .purgem step
)"
      :
      : "D"(reinterpret_cast<uint8_t*>(&lanes) + kBase), [count] "i"(K), [size] "i"(sizeof(Stream)),
        [position] "i"(offsetof(Stream, position) - kBase), [out] "i"(offsetof(Stream, out) - kBase),
        [begin] "i"(offsetof(Stream, out_begin) - kBase), [out_end] "i"(offsetof(Stream, out_end) - kBase),
        [moves] "i"(offsetof(Stream, moves) - kBase), [texts] "i"(offsetof(Stream, texts) - kBase),
        [distances] "i"(offsetof(Stream, distances) - kBase), [long_start] "i"(offsetof(Stream, long_start) - kBase),
        [long_distance_at] "i"(offsetof(Stream, long_distance_at) - kBase), [steps] "i"(offsetof(Lanes, steps) - kBase),
        [nothing] "i"(offsetof(Lanes, nothing) - kBase), [neutral] "i"(offsetof(Lanes, neutral) - kBase),
        [reversed] "i"(offsetof(Lanes, reversed) - kBase), [repeats] "i"(offsetof(Lanes, repeats.of) - kBase),
        [whole] "i"(offsetof(Lanes, repeats.whole) - kBase), [why] "i"(offsetof(Lanes, why) - kBase),
        [stream] "i"(offsetof(Lanes, stream) - kBase), [minus_length] "i"(offsetof(Lanes, minus_length) - kBase),
        [rbp] "i"(offsetof(Lanes, rbp) - kBase), [distance_bits] "i"(offsetof(Lanes, distance_bits) - kBase),
        [source] "i"(offsetof(Lanes, source) - kBase), [no_long] "i"(offsetof(Lanes, no_long) - kBase),
        [long_distance_bits] "i"(kLongDistanceBits), [near] "i"(kNear), [true_distance] "i"(kAbsurdDistance - 1),
        [copy] "i"(kMaxCopy)
      : "rax", "rbx", "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "cc",
        "memory");
  return {static_cast<Stop>(lanes.why), static_cast<int>(lanes.stream), 0 - lanes.minus_length};
}

template <int K, unsigned... kNear>
Stopped take_steps(Lanes& lanes, uint64_t steps, std::integer_sequence<unsigned, kNear...>) {
  static constexpr Stopped (*kTexts[])(Lanes&, uint64_t) = {take_steps<K, kNear>...};
  unsigned near = 0;
  for (int k = 0; k < K; ++k) near |= unsigned{lanes.habits[k].expects_near} << k;
  const Stopped stopped = kTexts[near](lanes, steps);
  for (int k = 0; k < K; ++k) lanes.habits[k].note(steps - lanes.steps, std::exchange(lanes.near[k], 0));
  return stopped;
}

template <int K>
Stopped take_steps(Lanes& lanes, uint64_t steps) {
  return take_steps<K>(lanes, steps, std::make_integer_sequence<unsigned, 1 << K>());
}
