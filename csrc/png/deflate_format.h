// deflate_format.h - the numbers of RFC 1950 and RFC 1951 that both inflate decoders need. Nothing here decodes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cxrfast::png {

constexpr int kMaxCodeBits = 15;
constexpr int kMaxLengthCodeBits = 7;  // of the code that codes the code lengths
constexpr int kLiteralSymbols = 288;   // 286 and 287 take part in the fixed code, but may not occur
constexpr int kDistanceSymbols = 32;   // likewise 30 and 31
constexpr int kMaxDynamicLiteralSymbols = 286;
constexpr int kMaxDynamicDistanceSymbols = 30;
constexpr int kLengthCodeSymbols = 19;
constexpr int kMaxRepeat = 138;  // of a code length
constexpr int kEndOfBlock = 256;
constexpr int kFirstLength = 257;
constexpr int kLengthSymbols = 29;
constexpr size_t kZlibHeaderNbytes = 2;
constexpr size_t kZlibTrailerNbytes = 4;

// RFC 1951, section 3.2.5. Index: symbol - kFirstLength.
inline constexpr uint16_t kLengthBase[kLengthSymbols] = {
    3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
inline constexpr uint8_t kLengthExtra[kLengthSymbols] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                                         2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
inline constexpr uint16_t kDistanceBase[kMaxDynamicDistanceSymbols] = {
    1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
    193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
inline constexpr uint8_t kDistanceExtra[kMaxDynamicDistanceSymbols] = {
    0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13};
constexpr int kMaxLengthExtra = 5;
// Section 3.2.7: the order in which the lengths of the length code are sent.
inline constexpr uint8_t kLengthCodeOrder[kLengthCodeSymbols] = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                                                 11, 4,  12, 3, 13, 2, 14, 1, 15};

// Section 3.2.6: the fixed code.
constexpr uint8_t fixed_literal_bits(int symbol) { return symbol < 144 ? 8 : symbol < 256 ? 9 : symbol < 280 ? 7 : 8; }
constexpr uint8_t kFixedDistanceBits = 5;

}  // namespace cxrfast::png
