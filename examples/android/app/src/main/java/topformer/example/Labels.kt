package topformer.example

import java.util.stream.IntStream
import kotlin.math.max
import kotlin.math.min

/**
 * For each pixel of an axis the two logits that it lies between, and the weight of the second: as PyTorch's
 * interpolate(mode="bilinear", align_corners=False) places them.
 */
private class Axis(size: Int, pixels: Int) {
    val weight = FloatArray(pixels)
    val first = IntArray(size + 1) { pixels } // of each cell, its first pixel; one more at the end

    init {
        for (i in pixels - 1 downTo 0) {
            val position = max((i + 0.5) * size / pixels - 0.5, 0.0)
            val lower = min(position.toInt(), size - 1)
            weight[i] = min(position - lower, 1.0).toFloat()
            first[lower] = i
        }
        for (cell in size - 1 downTo 0) first[cell] = min(first[cell], first[cell + 1])
    }
}

/**
 * The label of each pixel from a network's logits: a bilinear resize and the largest class, without computing most of
 * it. Gives height * width bytes for logits [rows, columns, classes] of one image, at most 256 classes.
 *
 * Within a cell, four neighbouring logits of the grid, every pixel's scores are the same average of the corners'. So a
 * class that is below another one, or below an average of others, at all four corners is below it at every pixel.
 */
fun findLabels(
    logits: FloatArray, rows: Int, columns: Int, classes: Int, height: Int, width: Int, threads: Int
): ByteArray {
    val down = Axis(rows, height)
    val across = Axis(columns, width)
    val labels = ByteArray(height * width)
    val winners = IntArray(rows * columns)

    // For each of the grid's rows; a thread for each band of them.
    fun run(body: (Int) -> Unit) {
        IntStream.range(0, threads).parallel().forEach { i ->
            for (row in rows * i / threads until rows * (i + 1) / threads) body(row)
        }
    }

    run { row ->
        for (at in row * columns until (row + 1) * columns) {
            var best = 0
            for (j in 1 until classes) if (logits[at * classes + j] > logits[at * classes + best]) best = j
            winners[at] = best
        }
    }

    run { row ->
        val candidates = IntArray(classes)
        val best = FloatArray(width)
        val found = ByteArray(width)
        val bars = Array(5) { FloatArray(4) }
        for (column in 0 until columns) {
            val top = down.first[row]
            val bottom = down.first[row + 1]
            val left = across.first[column]
            val right = across.first[column + 1]
            if (top == bottom || left == right) continue
            val below = min(row + 1, rows - 1)
            val beside = min(column + 1, columns - 1)
            val at = intArrayOf(
                row * columns + column, row * columns + beside, below * columns + column, below * columns + beside
            )
            val winner = winners[at[0]]
            if (at.all { winners[it] == winner }) {
                for (y in top until bottom) labels.fill(winner.toByte(), y * width + left, y * width + right)
                continue
            }
            // Scores that some class reaches at every pixel: those of the corners' winners, and their average.
            for (i in 0 until 4) {
                for (k in 0 until 4) bars[k][i] = logits[at[i] * classes + winners[at[k]]]
                bars[4][i] = (bars[0][i] + bars[1][i] + bars[2][i] + bars[3][i]) / 4
            }
            var count = 0
            for (j in 0 until classes) {
                val isBelow = bars.any { bar -> (0 until 4).all { i -> logits[at[i] * classes + j] < bar[i] } }
                if (!isBelow) candidates[count++] = j
            }
            for (y in top until bottom) {
                best.fill(Float.NEGATIVE_INFINITY, 0, right - left)
                val t = down.weight[y]
                for (c in 0 until count) {
                    val j = candidates[c]
                    val upper = logits[at[0] * classes + j]
                    val upperEnd = logits[at[1] * classes + j]
                    val start = upper + (logits[at[2] * classes + j] - upper) * t
                    val end = upperEnd + (logits[at[3] * classes + j] - upperEnd) * t
                    for (x in 0 until right - left) {
                        val score = start + (end - start) * across.weight[left + x]
                        if (score > best[x]) {
                            best[x] = score
                            found[x] = j.toByte()
                        }
                    }
                }
                found.copyInto(labels, y * width + left, 0, right - left)
            }
        }
    }
    return labels
}
