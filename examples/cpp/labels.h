// The label of each pixel from a network's logits: a bilinear resize to the size of the image and the largest class,
// without computing most of it. Needs nothing but C++17.
//
// Within a cell, four neighbouring logits of the grid, every pixel's scores are the same average of the corners'. So a
// class that is below another one, or below an average of others, at all four corners is below it at every pixel. Where
// one class is the largest at all four corners, as in most cells of a picture, nothing is left to compute; elsewhere a
// few classes are.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace topformer {

// For each pixel of an axis the two logits that it lies between, and the weight of the second: as PyTorch's
// interpolate(mode="bilinear", align_corners=False) places them.
struct Axis {
    std::vector<int> lower, upper;
    std::vector<float> weight;
    std::vector<int> first;  // of each cell, its first pixel; one more at the end

    Axis(int size, int pixels) : lower(pixels), upper(pixels), weight(pixels), first(size + 1, pixels) {
        for (int i = pixels - 1; i >= 0; --i) {
            const double position = std::max((i + 0.5) * size / pixels - 0.5, 0.0);
            lower[i] = std::min(int(position), size - 1);
            upper[i] = std::min(lower[i] + 1, size - 1);
            weight[i] = float(std::min(position - lower[i], 1.0));
            first[lower[i]] = i;
        }
        for (int cell = size - 1; cell >= 0; --cell) first[cell] = std::min(first[cell], first[cell + 1]);
    }
};

// Labels uint8 [height, width] for logits float [rows, columns, classes], of one image and at most 256 classes.
inline std::vector<uint8_t> find_labels(const float* logits, int rows, int columns, int classes, int height,
                                        int width, int threads) {
    const Axis down(rows, height), across(columns, width);
    std::vector<uint8_t> labels(size_t(height) * width);
    std::vector<uint8_t> winners(size_t(rows) * columns);
    threads = std::max(threads, 1);

    auto run = [&](auto&& body) {  // for each of the grid's rows; a thread for each band of them
        std::vector<std::thread> workers;
        for (int i = 0; i < threads; ++i)
            workers.emplace_back([&, i] {
                for (int row = rows * i / threads; row < rows * (i + 1) / threads; ++row) body(row);
            });
        for (auto& worker : workers) worker.join();
    };

    run([&](int row) {
        for (int at = row * columns; at < (row + 1) * columns; ++at) {
            const float* scores = logits + size_t(at) * classes;
            winners[at] = uint8_t(std::max_element(scores, scores + classes) - scores);
        }
    });

    run([&](int row) {
        std::vector<int> candidates;
        std::vector<float> best(width);
        std::vector<int> found(width);
        for (int column = 0; column < columns; ++column) {
            const int top = down.first[row], bottom = down.first[row + 1];
            const int left = across.first[column], right = across.first[column + 1];
            if (top == bottom || left == right) continue;
            const int below = std::min(row + 1, rows - 1), beside = std::min(column + 1, columns - 1);
            const int at[4] = {row * columns + column, row * columns + beside, below * columns + column,
                               below * columns + beside};
            const float* corner[4];
            int winner[4];
            for (int i = 0; i < 4; ++i) {
                corner[i] = logits + size_t(at[i]) * classes;
                winner[i] = winners[at[i]];
            }
            if (winner[0] == winner[1] && winner[0] == winner[2] && winner[0] == winner[3]) {
                for (int y = top; y < bottom; ++y)
                    std::fill_n(&labels[size_t(y) * width + left], right - left, uint8_t(winner[0]));
                continue;
            }
            // Scores that some class reaches at every pixel: those of the corners' winners, and their average.
            float bars[5][4] = {};
            for (int i = 0; i < 4; ++i)
                for (int k = 0; k < 4; ++k) {
                    bars[k][i] = corner[i][winner[k]];
                    bars[4][i] += bars[k][i] / 4;
                }
            candidates.clear();
            for (int j = 0; j < classes; ++j) {
                bool possible = true;
                for (const auto& bar : bars)
                    possible &= !(corner[0][j] < bar[0]) | !(corner[1][j] < bar[1]) | !(corner[2][j] < bar[2]) |
                                !(corner[3][j] < bar[3]);
                if (possible) candidates.push_back(j);
            }
            const int count = right - left;
            const float* weights = &across.weight[left];
            for (int y = top; y < bottom; ++y) {
                std::fill_n(best.begin(), count, -INFINITY);
                for (int j : candidates) {
                    const float start = corner[0][j] + (corner[2][j] - corner[0][j]) * down.weight[y];
                    const float end = corner[1][j] + (corner[3][j] - corner[1][j]) * down.weight[y];
                    for (int x = 0; x < count; ++x) {
                        const float score = start + (end - start) * weights[x];
                        found[x] = score > best[x] ? j : found[x];
                        best[x] = std::max(best[x], score);
                    }
                }
                for (int x = 0; x < count; ++x) labels[size_t(y) * width + left + x] = uint8_t(found[x]);
            }
        }
    });
    return labels;
}

}  // namespace topformer
