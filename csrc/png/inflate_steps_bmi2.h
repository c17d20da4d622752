// inflate_steps_bmi2.h - the steps of inflate_kernel.h in assembly, included by it for x86-64 CPUs with BMI2.
//
// Compilers run out of registers over three streams, spill what the next look-up waits for, and turn selections into
// branches; each costs as much as all the instructions that it saves. So the loop is assembly, one text for each
// stream, with everything rare outside of it. See Note [a step].
//
// Note [the chain]
// A stream waits for its own look-ups, one after the other: the literal entry, the second one, the distance. The bits
// that a step leaves over are kept for the first look-up of the next step, whose other bits are loaded meanwhile; 24
// cycles a step instead of 30, on a core whose loads take 5. Loads that extend a sign take one cycle more; hence
// entries of 64 bits.
//
// The text is macros of the assembler, a part of a step each, for the numbers and registers of one stream.
// Registers: rdi the lanes   rax the entries' sum, then minus the length   rbx, rcx, rdx scratch; in the end
// the index of the distance, the distance and its source   P position   O out   L bits that are left over, then the
// bits of this step

// [distance - 1]: what repeats the last `distance` bytes over a copy.
struct Repeats {
  alignas(16) uint8_t of[kMaxCopy][kMaxCopy];
};
constexpr Repeats kRepeats = [] {
  Repeats repeats{};
  for (size_t distance = 1; distance <= kMaxCopy; ++distance) {
    for (size_t i = 0; i < kMaxCopy; ++i) repeats.of[distance - 1][i] = static_cast<uint8_t>(i % distance);
  }
  return repeats;
}();

struct Lanes {
  Stream streams[kInflateStreams];
  uint64_t steps;  // left
  uint64_t nothing = 0;
  uint64_t neutral = kNeutral;
  decltype(kReversedLong) reversed = kReversedLong;
  Repeats repeats = kRepeats;
  // Where the steps stopped.
  uint64_t why, stream, minus_length;
  uint64_t distance_bits;  // scratch
};

// Takes up to `steps` > 0 steps of each of the first K streams.
//
// Labels, behind the stream's number: 1 long tables, 2 entry found, 3 stop for a symbol, 4 length above 16, 5 copied,
// 6 source before the start, 7 and 8 stop for a match, 9 distance's entry found, 10 long tables of the distance.
template <int K>
[[gnu::noinline]] Stopped take_steps(Lanes& lanes, uint64_t steps) {
  static_assert(K <= 3 && offsetof(Stream, literals) == 0 && static_cast<int>(Stop::kSteps) == 0 &&
                    static_cast<int>(Stop::kSymbol) == 1 && static_cast<int>(Stop::kMatch) == 2,
                "written into the text: there are 30 operands at most");
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

  .macro load k, P, P32, O, L, L32
    movq \k*%c[size]+%c[position](%%rdi), %%\P
    movq \k*%c[size]+%c[out](%%rdi), %%\O
    peek \P, \P32, \L, \L32
  .endm

  .macro step k, P, P32, O, L, L32
    movl %%\L32, %%ebx
    andl $(1 << %c[index_bits]) - 1, %%ebx
    movq \k*%c[size](%%rdi,%%rbx,8), %%rax
    peek \P, \P32, \L, \L32
    testq %%rax, %%rax
    jz 1\k\()f
  2\k:
    vmovd \k*%c[size]+2(%%rdi,%%rbx,8), %%xmm0
    vmovd %%xmm0, (%%\O)
    movzbl \k*%c[size]+6(%%rdi,%%rbx,8), %%ecx
    bextr %%rax, %%\L, %%rdx
    movq \k*%c[size](%%rdi,%%rdx,8), %%rbx
    vmovd \k*%c[size]+2(%%rdi,%%rdx,8), %%xmm0
    vmovd %%xmm0, (%%\O,%%rcx)
    testq %%rax, %%rax
    cmovs %c[nothing](%%rdi), %%rbx
    shrx %%rax, %%\L, %%\L
    shrx %%rbx, %%\L, %%\L
    addq %%rbx, %%rax
    movl %%\L32, %%ebx
    andl $(1 << %c[distance_index_bits]) - 1, %%ebx
    movzbl %%al, %%ecx
    addq %%rcx, %%\P
    rorx %[count_shift], %%rax, %%rcx
    movzbl %%cl, %%ecx
    addq %%rcx, %%\O
    sarq %[length_shift], %%rax
    cmovns %c[neutral](%%rdi), %%rbx
  9\k:
    movzbl \k*%c[size]+%c[distances]+6(%%rdi,%%rbx,8), %%edx
    movzwl \k*%c[size]+%c[distances]+4(%%rdi,%%rbx,8), %%ecx
    bextr %%rcx, %%\L, %%rcx
    shrx %%rdx, %%\L, %%\L
    addq %%rdx, %%\P
    addl \k*%c[size]+%c[distances](%%rdi,%%rbx,8), %%ecx
    movq %%\O, %%rdx
    subq %%rcx, %%rdx
    cmpq \k*%c[size]+%c[begin](%%rdi), %%rdx
    jl 6\k\()f
    cmpq $-%c[copy], %%rax
    jl 4\k\()f
    vmovdqu (%%rdx), %%xmm0
    vmovdqu %%xmm0, (%%\O)
    subq %%rax, %%\O
  5\k:
  .endm

  .macro rare k, P, P32, O, L, L32
  1\k:
    movzwl \k*%c[size]+%c[long_at](%%rdi,%%rbx,2), %%ebx
    movl %%\L32, %%ecx
    shrl %[index_bits], %%ecx
    andl $(1 << %c[long_bits]) - 1, %%ecx
    movzwl %c[reversed](%%rdi,%%rcx,2), %%ecx
    addl %%ecx, %%ebx
    movq \k*%c[size](%%rdi,%%rbx,8), %%rax
    testq %%rax, %%rax
    jnz 2\k\()b
  3\k:
    movl $1, %%ecx
    movl $\k, %%edx
    jmp 8f
  4\k: # what follows still needs its 32 bytes a step
    movzbl \k*%c[size]+%c[distances]+6(%%rdi,%%rbx,8), %%ebx
    movq %%rbx, %c[distance_bits](%%rdi)
    movq %%\O, %%rcx
    subq %%rax, %%rcx
    movq %c[steps](%%rdi), %%rbx
    shlq $5, %%rbx
    addq %%rcx, %%rbx
    cmpq \k*%c[size]+%c[out_end](%%rdi), %%rbx
    ja 7\k\()f
  9:
    vmovdqu (%%rdx), %%xmm0
    vmovdqu %%xmm0, (%%\O)
    addq $16, %%rdx
    addq $16, %%\O
    cmpq %%rcx, %%\O
    jb 9b
    movq %%rcx, %%\O
    jmp 5\k\()b
  7\k:
    movq %c[distance_bits](%%rdi), %%rbx
  8\k:
    subq %%rbx, %%\P
    movl $2, %%ecx
    movl $\k, %%edx
    jmp 8f
  6\k:
    movzbl \k*%c[size]+%c[distances]+6(%%rdi,%%rbx,8), %%ebx
    testq %%rax, %%rax
    jz 5\k\()b
    movl %%ecx, %%edx
    andl %[true_distance], %%edx
    jz 10\k\()f
    cmpl %[copy], %%edx
    ja 8\k\()b
    cmpq $-%c[copy], %%rax
    jl 8\k\()b
    movq %%\O, %%rcx
    subq %%rdx, %%rcx
    cmpq \k*%c[size]+%c[begin](%%rdi), %%rcx
    jl 8\k\()b
    shll $4, %%edx
    vmovdqu (%%rcx), %%xmm0
    vpshufb %c[repeats]-16(%%rdi,%%rdx), %%xmm0, %%xmm0
    vmovdqu %%xmm0, (%%\O)
    subq %%rax, %%\O
    jmp 5\k\()b
  10\k:
    movl %%\L32, %%ebx
    andl $(1 << %c[distance_index_bits]) - 1, %%ebx
    movzwl \k*%c[size]+%c[long_distance_at](%%rdi,%%rbx,2), %%ebx
    movl %%\L32, %%edx
    shrl %[distance_index_bits], %%edx
    andl $(1 << %c[long_distance_bits]) - 1, %%edx
    addl %%edx, %%ebx
    testl %[true_distance], \k*%c[size]+%c[distances](%%rdi,%%rbx,8)
    jnz 9\k\()b
    xorl %%ebx, %%ebx
    jmp 8\k\()b
  .endm

  .macro store k, P, P32, O, L, L32
    movq %%\P, \k*%c[size]+%c[position](%%rdi)
    movq %%\O, \k*%c[size]+%c[out](%%rdi)
  .endm

  .macro streams part
    \part 0, rsi, esi, r10, r13, r13d
    .if %c[count] > 1
    \part 1, r8, r8d, r11, r14, r14d
    .endif
    .if %c[count] > 2
    \part 2, r9, r9d, r12, r15, r15d
    .endif
  .endm

    streams load
    .p2align 6
  0:
    streams step
    subq $1, %c[steps](%%rdi)
    jnz 0b
    xorl %%ecx, %%ecx
    jmp 8f
    streams rare
  8:
    streams store
    movq %%rcx, %c[why](%%rdi)
    movq %%rdx, %c[stream](%%rdi)
    movq %%rax, %c[minus_length](%%rdi)

  .purgem peek
  .purgem load
  .purgem step
  .purgem rare
  .purgem store
  .purgem streams
)"
      :
      : "D"(&lanes), [count] "i"(K), [size] "i"(sizeof(Stream)), [position] "i"(offsetof(Stream, position)),
        [out] "i"(offsetof(Stream, out)), [begin] "i"(offsetof(Stream, out_begin)),
        [out_end] "i"(offsetof(Stream, out_end)), [distances] "i"(offsetof(Stream, distances)),
        [long_at] "i"(offsetof(Stream, long_at)), [long_distance_at] "i"(offsetof(Stream, long_distance_at)),
        [steps] "i"(offsetof(Lanes, steps)), [nothing] "i"(offsetof(Lanes, nothing)),
        [neutral] "i"(offsetof(Lanes, neutral)), [reversed] "i"(offsetof(Lanes, reversed)),
        [repeats] "i"(offsetof(Lanes, repeats)), [why] "i"(offsetof(Lanes, why)), [stream] "i"(offsetof(Lanes, stream)),
        [distance_bits] "i"(offsetof(Lanes, distance_bits)), [minus_length] "i"(offsetof(Lanes, minus_length)),
        [index_bits] "i"(kIndexBits), [long_bits] "i"(kLongBits), [distance_index_bits] "i"(kDistanceIndexBits),
        [long_distance_bits] "i"(kLongDistanceBits), [true_distance] "i"(kAbsurdDistance - 1),
        [count_shift] "i"(kCountShift), [length_shift] "i"(kMinusLengthShift), [copy] "i"(kMaxCopy)
      : "rax", "rbx", "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "cc",
        "memory");
  return {static_cast<Stop>(lanes.why), static_cast<int>(lanes.stream), 0 - lanes.minus_length};
}
