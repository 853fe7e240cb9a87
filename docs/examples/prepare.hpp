// Preparation of 8-bit RGB images for a detector with `fit = stretch`, byte for byte as in unflaw: the bilinear filter of
// Pillow, widened when it shrinks the image, in fixed point and two passes. docs/runtime.md specifies it.
// C++17, no libraries.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace unflaw {

constexpr int kBits = 22;  // fractional bits of the fixed-point weights

struct Taps {
    std::vector<int> first;                 // first input position of each output position
    std::vector<std::vector<int>> weights;  // weights from that position on
};

inline Taps taps(int in, int out) {
    const double scale = double(in) / out, widened = std::max(scale, 1.0);
    Taps result;
    for (int place = 0; place < out; ++place) {
        const double centre = (place + 0.5) * scale;
        const int low = std::max(0, int(centre - widened + 0.5));
        const int high = std::min(in, int(centre + widened + 0.5));
        std::vector<double> share;
        double sum = 0;
        for (int x = low; x < high; ++x) {
            share.push_back(std::max(0.0, 1 - std::abs((x - centre + 0.5) * (1 / widened))));
            sum += share.back();
        }
        std::vector<int> weights;
        for (double s : share) weights.push_back(int(s / sum * (1 << kBits) + 0.5));
        result.first.push_back(low);
        result.weights.push_back(weights);
    }
    return result;
}

// Resamples the middle axis of (before, in, after) bytes.
inline std::vector<uint8_t> resample(const std::vector<uint8_t>& from, int before, int in, int out, int after) {
    if (in == out) return from;
    const Taps filter = taps(in, out);
    std::vector<uint8_t> to(size_t(before) * out * after);
    for (int b = 0; b < before; ++b)
        for (int place = 0; place < out; ++place)
            for (int a = 0; a < after; ++a) {
                int sum = 1 << (kBits - 1);
                for (size_t i = 0; i < filter.weights[place].size(); ++i)
                    sum += filter.weights[place][i] * from[(size_t(b) * in + filter.first[place] + i) * after + a];
                to[(size_t(b) * out + place) * after + a] = uint8_t(std::clamp(sum >> kBits, 0, 255));
            }
    return to;
}

// (height, width, 3) bytes → (3, down, across) in [0, 1].
inline std::vector<float> prepare(const std::vector<uint8_t>& rgb, int width, int height, int across, int down) {
    std::vector<uint8_t> resized;
    if (height > down && height - down > 2 * (width - across))  // Pillow 13 resizes the columns first
        resized = resample(resample(rgb, 1, height, down, width * 3), down, width, across, 3);
    else
        resized = resample(resample(rgb, height, width, across, 3), 1, height, down, across * 3);
    const int n = across * down;
    std::vector<float> pixels(size_t(3) * n);
    for (int c = 0; c < 3; ++c)
        for (int i = 0; i < n; ++i) pixels[size_t(c) * n + i] = resized[size_t(i) * 3 + c] / 255.0f;
    return pixels;
}

}  // namespace unflaw
