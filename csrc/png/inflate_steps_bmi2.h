// inflate_steps_bmi2.h - the steps of inflate_kernel.h in assembly, included by it for x86-64 CPUs with BMI2.
//
// Compilers run out of registers over three streams, spill what the next look-up waits for, and turn selections into
// branches; each costs as much as all the instructions that it saves. So the loop is assembly, one text for each stream,
// with everything rare outside of it. See Note [a step].
//
// Note [the chain]
// A stream waits for its own look-ups, one after the other: the literal entry, the second one, the distance. The bits
// that a step leaves over are kept for the first look-up of the next step, whose other bits are loaded meanwhile; 24
// cycles a step instead of 30, on a core whose loads take 5. Loads that extend a sign take one cycle more; hence entries
// of 64 bits.
//
// Registers: rdi the lanes   rax the entries' sum, then minus the length   rbx, rcx, rdx scratch; rcx then the distance,
// rdx its source, rbx its bits   P position   O out   L bits that are left over, then the bits of this step

struct Lanes {
  Stream streams[kInflateStreams];
  uint64_t steps;  // left
  uint64_t nothing = 0;
  uint64_t neutral = 1 << kDistanceIndexBits;  // the index of the neutral distance
  // Where the steps stopped.
  uint64_t why, stream;
  uint64_t distance, distance_bits, minus_length;  // kMatch
};

// Labels, behind the stream's number: 1 long tables, 2 entry found, 3 stop for a symbol, 4 length above 16, 5 copied,
// 6 source before the start, 7 stop for a match.
#define CXRFAST_STEP(K, P, P32, O, L, L32)                        \
  "movl %%" L32 ", %%ebx\n\t"                                     \
  "andl %[index_mask], %%ebx\n\t"                                 \
  "movq " K "*%c[size]+%c[literals](%%rdi,%%rbx,8), %%rax\n\t"    \
  "testq %%rax, %%rax\n\t"                                        \
  "jz 1" K "f\n"                                                  \
  "2" K ":\n\t"                                                   \
  "vmovd " K "*%c[size]+%c[literals]+2(%%rdi,%%rbx,8), %%xmm0\n\t" \
  "vmovd %%xmm0, (%%" O ")\n\t"                                   \
  "movzbl " K "*%c[size]+%c[literals]+6(%%rdi,%%rbx,8), %%ecx\n\t" \
  "movq %%" P ", %%rdx\n\t"                                       \
  "shrq $3, %%rdx\n\t"                                            \
  "movl %%" P32 ", %%" L32 "\n\t"                                 \
  "andl $7, %%" L32 "\n\t"                                        \
  "shrx %%" L ", (%%rdx), %%" L "\n\t"                            \
  "bextr %%rax, %%" L ", %%rdx\n\t"                               \
  "movq " K "*%c[size]+%c[literals](%%rdi,%%rdx,8), %%rbx\n\t"    \
  "vmovd " K "*%c[size]+%c[literals]+2(%%rdi,%%rdx,8), %%xmm0\n\t" \
  "vmovd %%xmm0, (%%" O ",%%rcx)\n\t"                             \
  "testq %%rax, %%rax\n\t"                                        \
  "cmovs %c[nothing](%%rdi), %%rbx\n\t"                           \
  "shrx %%rax, %%" L ", %%" L "\n\t"                              \
  "shrx %%rbx, %%" L ", %%" L "\n\t"                              \
  "addq %%rbx, %%rax\n\t"                                         \
  "movl %%" L32 ", %%ebx\n\t"                                     \
  "andl %[distance_mask], %%ebx\n\t"                              \
  "movzbl %%al, %%ecx\n\t"                                        \
  "addq %%rcx, %%" P "\n\t"                                       \
  "movq %%rax, %%rcx\n\t"                                         \
  "shrq %[count_shift], %%rcx\n\t"                                \
  "movzbl %%cl, %%ecx\n\t"                                        \
  "addq %%rcx, %%" O "\n\t"                                       \
  "sarq %[length_shift], %%rax\n\t"                               \
  "cmovns %c[neutral](%%rdi), %%rbx\n\t"                          \
  "movzwl " K "*%c[size]+%c[distances]+4(%%rdi,%%rbx,8), %%ecx\n\t" \
  "bextr %%rcx, %%" L ", %%rcx\n\t"                               \
  "addl " K "*%c[size]+%c[distances](%%rdi,%%rbx,8), %%ecx\n\t"   \
  "movzbl " K "*%c[size]+%c[distances]+6(%%rdi,%%rbx,8), %%ebx\n\t" \
  "shrx %%rbx, %%" L ", %%" L "\n\t"                              \
  "addq %%rbx, %%" P "\n\t"                                       \
  "movq %%" O ", %%rdx\n\t"                                       \
  "subq %%rcx, %%rdx\n\t"                                         \
  "cmpq " K "*%c[size]+%c[begin](%%rdi), %%rdx\n\t"               \
  "jl 6" K "f\n\t"                                                \
  "cmpq %[minus_copy], %%rax\n\t"                                 \
  "jl 4" K "f\n\t"                                                \
  "vmovdqu (%%rdx), %%xmm0\n\t"                                   \
  "vmovdqu %%xmm0, (%%" O ")\n\t"                                 \
  "subq %%rax, %%" O "\n"                                         \
  "5" K ":\n\t"

// The same stream's rare cases. 1: the bits left over may be too few. 4: what follows still needs its 32 bytes a step.
#define CXRFAST_RARE(K, P, P32, O, L, L32)                        \
  "1" K ":\n\t"                                                   \
  "movzwl " K "*%c[size]+%c[long_at](%%rdi,%%rbx,2), %%ebx\n\t"   \
  "movq %%" P ", %%rdx\n\t"                                       \
  "shrq $3, %%rdx\n\t"                                            \
  "movl %%" P32 ", %%ecx\n\t"                                     \
  "andl $7, %%ecx\n\t"                                            \
  "shrx %%rcx, (%%rdx), %%rcx\n\t"                                \
  "shrl %[index_bits], %%ecx\n\t"                                 \
  "andl %[long_mask], %%ecx\n\t"                                  \
  "addl %%ecx, %%ebx\n\t"                                         \
  "movq " K "*%c[size]+%c[literals](%%rdi,%%rbx,8), %%rax\n\t"    \
  "testq %%rax, %%rax\n\t"                                        \
  "jnz 2" K "b\n"                                                 \
  "3" K ":\n\t"                                                   \
  "movl %[stop_symbol], %%ecx\n\t"                                \
  "movl $" K ", %%edx\n\t"                                        \
  "jmp 8f\n"                                                      \
  "4" K ":\n\t"                                                   \
  "movq %%rbx, %c[distance_bits](%%rdi)\n\t"                      \
  "movq %%" O ", %%rcx\n\t"                                       \
  "subq %%rax, %%rcx\n\t"                                         \
  "movq %c[steps](%%rdi), %%rbx\n\t"                              \
  "shlq $5, %%rbx\n\t"                                            \
  "addq %%rcx, %%rbx\n\t"                                         \
  "cmpq " K "*%c[size]+%c[out_end](%%rdi), %%rbx\n\t"             \
  "ja 7" K "f\n"                                                  \
  "9:\n\t"                                                        \
  "vmovdqu (%%rdx), %%xmm0\n\t"                                   \
  "vmovdqu %%xmm0, (%%" O ")\n\t"                                 \
  "addq $16, %%rdx\n\t"                                           \
  "addq $16, %%" O "\n\t"                                         \
  "cmpq %%rcx, %%" O "\n\t"                                       \
  "jb 9b\n\t"                                                     \
  "movq %%rcx, %%" O "\n\t"                                       \
  "jmp 5" K "b\n"                                                 \
  "7" K ":\n\t"                                                   \
  "movq %c[distance_bits](%%rdi), %%rbx\n\t"                      \
  "xorl %%ecx, %%ecx\n"                                           \
  "6" K ":\n\t"                                                   \
  "subq %%rbx, %%" P "\n\t"                                       \
  "movq %%rcx, %c[distance](%%rdi)\n\t"                           \
  "movq %%rbx, %c[distance_bits](%%rdi)\n\t"                      \
  "movl %[stop_match], %%ecx\n\t"                                 \
  "movl $" K ", %%edx\n\t"                                        \
  "jmp 8f\n"

#define CXRFAST_LOAD(K, P, P32, O, L, L32)                        \
  "movq " K "*%c[size]+%c[position](%%rdi), %%" P "\n\t"          \
  "movq " K "*%c[size]+%c[out](%%rdi), %%" O "\n\t"               \
  "movq %%" P ", %%rdx\n\t"                                       \
  "shrq $3, %%rdx\n\t"                                            \
  "movl %%" P32 ", %%" L32 "\n\t"                                 \
  "andl $7, %%" L32 "\n\t"                                        \
  "shrx %%" L ", (%%rdx), %%" L "\n\t"

#define CXRFAST_STORE(K, P, P32, O, L, L32)                       \
  "movq %%" P ", " K "*%c[size]+%c[position](%%rdi)\n\t"          \
  "movq %%" O ", " K "*%c[size]+%c[out](%%rdi)\n\t"

#define CXRFAST_STREAM_0(PART) PART("0", "rsi", "esi", "r10", "r13", "r13d")
#define CXRFAST_STREAM_1(PART) PART("1", "r8", "r8d", "r11", "r14", "r14d")
#define CXRFAST_STREAM_2(PART) PART("2", "r9", "r9d", "r12", "r15", "r15d")
#define CXRFAST_STREAMS_1(PART) CXRFAST_STREAM_0(PART)
#define CXRFAST_STREAMS_2(PART) CXRFAST_STREAMS_1(PART) CXRFAST_STREAM_1(PART)
#define CXRFAST_STREAMS_3(PART) CXRFAST_STREAMS_2(PART) CXRFAST_STREAM_2(PART)

#define CXRFAST_LOOP(STREAMS)                                                                                          \
  asm volatile(STREAMS(CXRFAST_LOAD) ".p2align 6\n"                                                                    \
                                     "0:\n\t" STREAMS(CXRFAST_STEP) "subq $1, %c[steps](%%rdi)\n\t"                    \
                                     "jnz 0b\n\t"                                                                      \
                                     "movl %[stop_steps], %%ecx\n\t"                                                   \
                                     "jmp 8f\n" STREAMS(CXRFAST_RARE) "8:\n\t" STREAMS(CXRFAST_STORE)                  \
                                         "movq %%rcx, %c[why](%%rdi)\n\t"                                              \
                                         "movq %%rdx, %c[stream](%%rdi)\n\t"                                           \
                                         "movq %%rax, %c[minus_length](%%rdi)\n\t"                                     \
               :                                                                                                       \
               : "D"(&lanes), [size] "i"(sizeof(Stream)), [literals] "i"(offsetof(Stream, literals)),                  \
                 [distances] "i"(offsetof(Stream, distances)), [long_at] "i"(offsetof(Stream, long_at)),               \
                 [position] "i"(offsetof(Stream, position)), [out] "i"(offsetof(Stream, out)),                         \
                 [begin] "i"(offsetof(Stream, out_begin)), [out_end] "i"(offsetof(Stream, out_end)),                   \
                 [steps] "i"(offsetof(Lanes, steps)), [nothing] "i"(offsetof(Lanes, nothing)),                         \
                 [neutral] "i"(offsetof(Lanes, neutral)), [why] "i"(offsetof(Lanes, why)),                             \
                 [stream] "i"(offsetof(Lanes, stream)), [distance] "i"(offsetof(Lanes, distance)),                     \
                 [distance_bits] "i"(offsetof(Lanes, distance_bits)), \
                 [minus_length] "i"(offsetof(Lanes, minus_length)), [index_mask] "i"((1 << kIndexBits) - 1),           \
                 [distance_mask] "i"((1 << kDistanceIndexBits) - 1), [count_shift] "i"(kCountShift),                   \
                 [length_shift] "i"(kMinusLengthShift), [minus_copy] "i"(-static_cast<int>(kMaxCopy)),                 \
                 [index_bits] "i"(kIndexBits), [long_mask] "i"(kLongEntries - 1),                                      \
                 [stop_steps] "i"(static_cast<int>(Stop::kSteps)), [stop_symbol] "i"(static_cast<int>(Stop::kSymbol)), \
                 [stop_match] "i"(static_cast<int>(Stop::kMatch))                                                      \
               : "rax", "rbx", "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0",      \
                 "cc", "memory")

// Takes up to `steps` > 0 steps of each of the first K streams.
template <int K>
[[gnu::noinline]] Stopped take_steps(Lanes& lanes, uint64_t steps) {
  lanes.steps = steps;
  for (;;) {
    if constexpr (K == 1) {
      CXRFAST_LOOP(CXRFAST_STREAMS_1);
    } else if constexpr (K == 2) {
      CXRFAST_LOOP(CXRFAST_STREAMS_2);
    } else {
      static_assert(K == 3);
      CXRFAST_LOOP(CXRFAST_STREAMS_3);
    }
    const Stop why = static_cast<Stop>(lanes.why);
    const int which = static_cast<int>(lanes.stream);
    if (why == Stop::kSteps) return {why, 0, 0};
    if (why == Stop::kSymbol) return {why, which, 0};
    Stream& stream = lanes.streams[which];
    const size_t length = 0 - lanes.minus_length;
    if (!copy_near(stream, stream.out, lanes.distance, length)) return {why, which, length};
    stream.out += length;
    stream.position += lanes.distance_bits;
    if (--lanes.steps == 0) return {Stop::kSteps, 0, 0};
  }
}

#undef CXRFAST_STEP
#undef CXRFAST_RARE
#undef CXRFAST_LOAD
#undef CXRFAST_STORE
#undef CXRFAST_STREAM_0
#undef CXRFAST_STREAM_1
#undef CXRFAST_STREAM_2
#undef CXRFAST_STREAMS_1
#undef CXRFAST_STREAMS_2
#undef CXRFAST_STREAMS_3
#undef CXRFAST_LOOP
