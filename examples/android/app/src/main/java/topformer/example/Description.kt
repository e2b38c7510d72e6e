package topformer.example

import java.io.ByteArrayInputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.zip.ZipInputStream

/** What a .tflite file says of itself, as JSON: the one file in the zip archive at its end. */
fun readDescription(bytes: ByteArray): String {
    val numbers = ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN)
    val last = bytes.size - 22 // the archive's last record, which has no comment
    require(last > 0 && numbers.getInt(last) == 0x06054b50) { "the file was not written by topformer_jax.export" }
    val directory = last - numbers.getInt(last + 12)
    val entry = numbers.getInt(directory + 42) // counted from the start of the file
    ZipInputStream(ByteArrayInputStream(bytes, entry, bytes.size - entry)).use { archive ->
        requireNotNull(archive.nextEntry)
        return archive.readBytes().toString(Charsets.UTF_8)
    }
}
