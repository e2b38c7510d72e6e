// Labels.kt as a command, like labels.cpp.

import java.nio.ByteBuffer
import java.nio.ByteOrder
import topformer.example.findLabels

fun main(words: Array<String>) {
    val (rows, columns, classes, height, width) = words.map { it.toInt() }
    val bytes = ByteBuffer.wrap(System.`in`.readBytes()).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
    val logits = FloatArray(rows * columns * classes).also { bytes.get(it) }
    System.out.write(findLabels(logits, rows, columns, classes, height, width, words[5].toInt()))
    System.out.flush()
}
