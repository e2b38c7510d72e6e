// Labels.kt as a command, like labels.cpp; without arguments Description.kt, for a file from standard input.

import java.nio.ByteBuffer
import java.nio.ByteOrder
import topformer.example.findLabels
import topformer.example.readDescription

fun main(words: Array<String>) {
    val input = System.`in`.readBytes()
    if (words.isEmpty()) return print(readDescription(input))
    val (rows, columns, classes, height, width) = words.map { it.toInt() }
    val logits = FloatArray(rows * columns * classes)
    ByteBuffer.wrap(input).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer().get(logits)
    System.out.write(findLabels(logits, rows, columns, classes, height, width, words[5].toInt()))
    System.out.flush()
}
