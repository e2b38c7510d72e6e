package topformer.example

import android.content.res.AssetManager
import android.graphics.Bitmap
import android.graphics.Color
import java.io.FileInputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import org.json.JSONObject
import org.tensorflow.lite.Interpreter

/** A .tflite file of logits among the app's assets, in LiteRT. Not for several threads at once. */
class Network(assets: AssetManager, name: String, private val threads: Int) {
    class Result(val overlay: Bitmap, val networkMillis: Double, val labelMillis: Double)

    private val interpreter: Interpreter
    private val colours: IntArray // of each class

    init {
        val descriptor = assets.openFd(name)
        val file = FileInputStream(descriptor.fileDescriptor).channel.map(
            FileChannel.MapMode.READ_ONLY, descriptor.startOffset, descriptor.declaredLength
        )
        interpreter = Interpreter(file, Interpreter.Options().setNumThreads(threads))
        val bytes = assets.open(name).use { it.readBytes() }
        val description = JSONObject(readDescription(bytes))
        require(description.getString("output") == "logits") { "$name has no logits: export with --logits" }
        val palette = description.getJSONArray("palette")
        colours = IntArray(palette.length()) { i ->
            val colour = palette.getJSONArray(i)
            Color.rgb(colour.getInt(0), colour.getInt(1), colour.getInt(2))
        }
    }

    /** Labels a picture, which is resized to the size that the file was exported for. */
    fun segment(picture: Bitmap): Result {
        val (_, height, width, _) = interpreter.getInputTensor(0).shape()
        val resized = Bitmap.createScaledBitmap(picture, width, height, true)
        val pixels = IntArray(width * height)
        resized.getPixels(pixels, 0, width, 0, 0, width, height)
        val input = ByteBuffer.allocateDirect(3 * pixels.size)
        for (pixel in pixels) {
            input.put(Color.red(pixel).toByte())
            input.put(Color.green(pixel).toByte())
            input.put(Color.blue(pixel).toByte())
        }
        input.rewind()
        val (_, rows, columns, classes) = interpreter.getOutputTensor(0).shape()
        val output = ByteBuffer.allocateDirect(4 * rows * columns * classes).order(ByteOrder.nativeOrder())
        val start = System.nanoTime()
        interpreter.run(input, output)
        val middle = System.nanoTime()
        output.rewind()
        val logits = FloatArray(rows * columns * classes)
        output.asFloatBuffer().get(logits)
        val labels = findLabels(logits, rows, columns, classes, height, width, threads)
        val end = System.nanoTime()
        for (i in pixels.indices) { // half picture, half colour
            val colour = colours[labels[i].toInt() and 255]
            pixels[i] = Color.rgb(
                (Color.red(pixels[i]) + Color.red(colour)) / 2,
                (Color.green(pixels[i]) + Color.green(colour)) / 2,
                (Color.blue(pixels[i]) + Color.blue(colour)) / 2,
            )
        }
        val overlay = Bitmap.createBitmap(pixels, width, height, Bitmap.Config.ARGB_8888)
        return Result(overlay, (middle - start) / 1e6, (end - middle) / 1e6)
    }
}
