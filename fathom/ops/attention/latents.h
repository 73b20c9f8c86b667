// Attention of one token's heads over cached latents, which are key and value of all heads at once.
//
// The past is processed in runs of neighbouring rows with an online softmax: the sums so far are scaled down when a
// larger score appears. Processors with bfloat16 dot products use them for bfloat16 caches (queries and exponentials
// are rounded); float32 caches, and other processors, take the plain form.
//
// Letters: H heads, C latent, W = C + R the width of a cached row.

#pragma once

#include "linear/gemv.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t kRun = 128;  // rows taken at once at most

// The plain form, and the interface of both.
template <class T>
class LatentAttention {
  public:
    LatentAttention(int64_t heads, int64_t latent, int64_t width)
        : heads_(heads), latent_(latent), width_(width), powers_(heads * kRun) {
        for (int64_t h = 0; h < heads; h++) rows_.push_back(powers_.data() + h * kRun);
    }

    // (H) rows of W: each head's query in terms of the latents, scaled.
    void set_queries(const float* const* queries) { queries_ = queries; }

    // (H) rows of C for the sums that follow, each head's largest score and the sum of its powers.
    void begin(float* const* outs, float* highest, float* total) {
        outs_ = outs, highest_ = highest, total_ = total;
        std::fill(highest, highest + heads_, -INFINITY);
        std::fill(total, total + heads_, 0.0f);
        for (int64_t h = 0; h < heads_; h++) std::fill(outs[h], outs[h] + latent_, 0.0f);
    }

    // Takes in `count` rows, at most kRun.
    void attend(const T* rows, int64_t count) {
        const Weight keys{rows, nullptr, sizeof(T) == 4 ? kFloat32 : kBfloat16, count, width_};
        GemvInputs(keys, queries_, heads_).gemv(keys, 0, count, rows_.data());
        for (int64_t h = 0; h < heads_; h++) update_softmax(h, count);
        add_weighted_rows(rows, width_, count, latent_, rows_.data(), outs_, heads_);
    }

    void end() {}

  private:
    void update_softmax(int64_t h, int64_t count) {
        float* scores = rows_[h];
        float highest = highest_[h];
        each(count, [&](int64_t i, int64_t n) {
            highest = std::max(highest, largest(mask_tail(load(scores + i, n), n, -INFINITY)));
        });
        Floats sums = {};
        each(count, [&](int64_t i, int64_t n) {
            Floats powers = mask_tail(exponential(load(scores + i, n) - highest), n, 0.0f);
            sums += powers;
            store(scores + i, powers, n);
        });
        const float rescale = std::exp(highest_[h] - highest);
        if (rescale != 1.0f)
            each(latent_, [&](int64_t i, int64_t n) { store(outs_[h] + i, load(outs_[h] + i, n) * rescale, n); });
        total_[h] = total_[h] * rescale + sum(sums);
        highest_[h] = highest;
    }

    const int64_t heads_, latent_, width_;
    const float* const* queries_;
    float* const* outs_;
    float *highest_, *total_;
    std::vector<float> powers_;  // (H, kRun)
    std::vector<float*> rows_;
};

#ifdef __AVX512BF16__

inline Words broadcast(const void* word) {
    int32_t value;
    std::memcpy(&value, word, 4);
    return (Words)_mm512_set1_epi32(value);
}

// Two vectors as bfloat16 pairs: x[i] and y[i] in one word.
inline Words paired(Floats x, Floats y) {
    Halves low, high;
    store(reinterpret_cast<bf16*>(&low), x);
    store(reinterpret_cast<bf16*>(&high), y);
    return __builtin_convertvector(low, Words) | (__builtin_convertvector(high, Words) << 16);
}

// For scores a vector holds sixteen heads and a cached pair is repeated across it; no sum over a vector's lanes is ever
// needed. For values a vector holds sixteen columns, and pairs are made of neighbouring rows.
template <>
class LatentAttention<bf16> {
  public:
    LatentAttention(int64_t heads, int64_t latent, int64_t width)
        : heads_(heads), latent_(latent), width_(width), words_((width + 1) / 2),
          groups_((heads + kLanes - 1) / kLanes), queries_(groups_ * words_), highest_(groups_), total_(groups_) {}

    void set_queries(const float* const* queries) {
        if (last_queries_ == queries) return;
        last_queries_ = queries;
        for (int64_t g = 0; g < groups_; g++) {
            const int64_t first = g * kLanes, here = std::min(heads_ - first, kLanes);
            for (int64_t word = 0; word < words_; word++) {
                float even[kLanes] = {}, odd[kLanes] = {};
                for (int64_t h = 0; h < here; h++) {
                    even[h] = queries[first + h][2 * word];
                    if (2 * word + 1 < width_) odd[h] = queries[first + h][2 * word + 1];
                }
                queries_[g * words_ + word] = paired(load(even), load(odd));
            }
        }
    }

    void begin(float* const* outs, float* highest, float* total) {
        outs_ = outs, highest_out_ = highest, total_out_ = total;
        std::fill(highest_.begin(), highest_.end(), fill(-INFINITY));
        std::fill(total_.begin(), total_.end(), Floats{});
        for (int64_t h = 0; h < heads_; h++) std::fill(outs[h], outs[h] + latent_, 0.0f);
    }

    void attend(const bf16* rows, int64_t count) {
        for (int64_t g = 0; g < groups_; g++) {
            score(&queries_[g * words_], rows, count);
            const Floats rescale = update_softmax(g, count);
            const int64_t first = g * kLanes, here = std::min(heads_ - first, kLanes);
            for (int64_t h = 0; h < here; h += kMixed) {
                switch (std::min(here - h, kMixed)) {
                    case 1: mix<1>(rows, count, first + h, h, rescale); break;
                    case 2: mix<2>(rows, count, first + h, h, rescale); break;
                    case 3: mix<3>(rows, count, first + h, h, rescale); break;
                    case 4: mix<4>(rows, count, first + h, h, rescale); break;
                    case 5: mix<5>(rows, count, first + h, h, rescale); break;
                    case 6: mix<6>(rows, count, first + h, h, rescale); break;
                    case 7: mix<7>(rows, count, first + h, h, rescale); break;
                    default: mix<8>(rows, count, first + h, h, rescale);
                }
            }
        }
    }

    void end() {
        for (int64_t h = 0; h < heads_; h++) {
            highest_out_[h] = highest_[h / kLanes][h % kLanes];
            total_out_[h] = total_[h / kLanes][h % kLanes];
        }
    }

  private:
    static constexpr int64_t kScored = 8, kMixed = 8;  // rows, heads whose sums fit the registers together
    static constexpr int64_t kAhead = 32;              // rows between what is multiplied and what is fetched

    void score(const Words* queries, const bf16* rows, int64_t count) {
        int64_t t = 0;
        for (; t + kScored <= count; t += kScored) score_rows<kScored>(queries, rows + t * width_, &scores_[t]);
        for (; t < count; t++) score_rows<1>(queries, rows + t * width_, &scores_[t]);
    }

    template <int kRows>
    __attribute__((noinline)) void score_rows(const Words* queries, const bf16* rows, Floats* scores) {
        const bf16* row[kRows];
        Floats even[kRows] = {}, odd[kRows] = {};
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) row[r] = rows + r * width_;
        const int64_t whole = width_ / 2, ahead = kAhead * width_;
        int64_t word = 0;
        for (; word + 2 <= whole; word += 2) {
            if (word % 32 == 0)
#pragma GCC unroll 8
                for (int r = 0; r < kRows; r++) fetch(row[r] + ahead + 2 * word);
            const Words first = queries[word], second = queries[word + 1];
#pragma GCC unroll 8
            for (int r = 0; r < kRows; r++) {
                even[r] = add_pairs(even[r], first, broadcast(row[r] + 2 * word));
                odd[r] = add_pairs(odd[r], second, broadcast(row[r] + 2 * word + 2));
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) {
            if (word < whole) even[r] = add_pairs(even[r], queries[word], broadcast(row[r] + 2 * word));
            if (width_ % 2) {
                const bf16 last[2] = {row[r][width_ - 1], {}};
                odd[r] = add_pairs(odd[r], queries[words_ - 1], broadcast(last));
            }
            scores[r] = even[r] + odd[r];
        }
    }

    // The exponentials of the scores, rows in pairs; returns the factor by which earlier sums are rescaled.
    Floats update_softmax(int64_t g, int64_t count) {
        Floats highest = highest_[g];
        for (int64_t t = 0; t < count; t++) highest = scores_[t] > highest ? scores_[t] : highest;
        const Floats rescale = exponential(highest_[g] - highest);
        Floats total = total_[g] * rescale;
        for (int64_t t = 0; t < count; t += 2) {
            const Floats first = exponential(scores_[t] - highest);
            const Floats second = t + 1 < count ? exponential(scores_[t + 1] - highest) : Floats{};
            total += first + second;
            powers_[t / 2] = paired(first, second);
        }
        highest_[g] = highest;
        total_[g] = total;
        return rescale;
    }

    // Heads `head` …, which are the lanes from `lane` on.
    template <int kHeads>
    __attribute__((noinline)) void mix(const bf16* rows, int64_t count, int64_t head, int64_t lane, Floats rescale) {
        const Words low = interleaving(0), high = interleaving(kLanes);
        const uint32_t* powers = reinterpret_cast<const uint32_t*>(powers_) + lane;
        for (int64_t c = 0; c < latent_; c += 2 * kLanes) {
            const int64_t columns = std::min(latent_ - c, 2 * kLanes);
            const __mmask32 there = uint32_t((uint64_t(1) << columns) - 1);
            const __mmask16 first = uint16_t(there), second = uint16_t(there >> kLanes);
            Floats left[kHeads], right[kHeads];
#pragma GCC unroll 8
            for (int h = 0; h < kHeads; h++) {
                const float* out = outs_[head + h] + c;
                left[h] = (Floats)_mm512_maskz_loadu_ps(first, out) * rescale[lane + h];
                right[h] = (Floats)_mm512_maskz_loadu_ps(second, out + kLanes) * rescale[lane + h];
            }
            const bf16* row = rows + c;
            for (int64_t t = 0; t < count; t += 2, row += 2 * width_) {
                // Of an odd count the last row is paired with itself, with an exponential of zero.
                const __m512i one = _mm512_maskz_loadu_epi16(there, row);
                const __m512i other = _mm512_maskz_loadu_epi16(there, t + 1 < count ? row + width_ : row);
                const Words x = (Words)_mm512_permutex2var_epi16(one, (__m512i)low, other);
                const Words y = (Words)_mm512_permutex2var_epi16(one, (__m512i)high, other);
#pragma GCC unroll 8
                for (int h = 0; h < kHeads; h++) {
                    const Words power = broadcast(powers + t * (kLanes / 2) + h);
                    left[h] = add_pairs(left[h], x, power);
                    right[h] = add_pairs(right[h], y, power);
                }
            }
#pragma GCC unroll 8
            for (int h = 0; h < kHeads; h++) {
                float* out = outs_[head + h] + c;
                _mm512_mask_storeu_ps(out, first, (__m512)left[h]);
                _mm512_mask_storeu_ps(out + kLanes, second, (__m512)right[h]);
            }
        }
    }

    // Which of two rows' elements make the pairs of columns `from` … `from` + 15.
    static Words interleaving(int64_t from) {
        Words places;
        for (int64_t i = 0; i < kLanes; i++) places[i] = uint32_t(from + i) | uint32_t(from + i + 2 * kLanes) << 16;
        return places;
    }

    const int64_t heads_, latent_, width_, words_, groups_;
    const float* const* last_queries_ = nullptr;
    float* const* outs_;
    float *highest_out_, *total_out_;
    std::vector<Words> queries_;            // (groups, words): pairs of columns, a lane a head
    std::vector<Floats> highest_, total_;   // (groups)
    Floats scores_[kRun];
    Words powers_[kRun / 2];
};

#endif

}  // namespace
