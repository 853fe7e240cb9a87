// How unflaw brings 8-bit RGB images to the canvas of a detector with `fit = stretch`: the bilinear filter of Pillow,
// widened where it shrinks, in fixed point and two passes, so that the bytes are the same. The first half of the contract
// in docs/runtime.md. C++17, no libraries.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace unflaw {

constexpr int kBits = 22;  // of the fixed-point weights

struct Taps {
    std::vector<int> first;        // of each output place, the first input place that counts
    std::vector<std::vector<int>> weights;  // and the weights from there on
};

inline Taps taps(int in, int out) {
    const double scale = double(in) / out, widened = std::max(scale, 1.0);
    Taps found;
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
        found.first.push_back(low);
        found.weights.push_back(weights);
    }
    return found;
}

// One pass over the middle axis of (before, in, after) bytes.
inline std::vector<uint8_t> resample(const std::vector<uint8_t>& from, int before, int in, int out, int after) {
    if (in == out) return from;
    const Taps found = taps(in, out);
    std::vector<uint8_t> to(size_t(before) * out * after);
    for (int b = 0; b < before; ++b)
        for (int place = 0; place < out; ++place)
            for (int a = 0; a < after; ++a) {
                int sum = 1 << (kBits - 1);
                for (size_t i = 0; i < found.weights[place].size(); ++i)
                    sum += found.weights[place][i] * from[(size_t(b) * in + found.first[place] + i) * after + a];
                to[(size_t(b) * out + place) * after + a] = uint8_t(std::clamp(sum >> kBits, 0, 255));
            }
    return to;
}

// (height, width, 3) bytes → (3, size, size) in [0, 1].
inline std::vector<float> prepare(const std::vector<uint8_t>& rgb, int width, int height, int size) {
    std::vector<uint8_t> square;
    if (height > 100 * width && size < height)  // of long and thin images Pillow takes the columns first
        square = resample(resample(rgb, 1, height, size, width * 3), size, width, size, 3);
    else
        square = resample(resample(rgb, height, width, size, 3), 1, height, size, size * 3);
    std::vector<float> pixels(size_t(3) * size * size);
    for (int c = 0; c < 3; ++c)
        for (int i = 0; i < size * size; ++i) pixels[size_t(c) * size * size + i] = square[size_t(i) * 3 + c] / 255.0f;
    return pixels;
}

}  // namespace unflaw
