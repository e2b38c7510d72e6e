package topformer.example

import android.app.Activity
import android.content.Intent
import android.graphics.ImageDecoder
import android.net.Uri
import android.os.Bundle
import android.view.ViewGroup.LayoutParams
import android.widget.Button
import android.widget.ImageView
import android.widget.LinearLayout
import android.widget.TextView
import java.util.concurrent.Executors

private const val LONGEST_SIDE = 2048 // of a picture in memory, in pixels: less than twice as many

/** Picks a picture, shows it with the colours of its classes, and says how long network and labels took. */
class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor()
    private var network: Network? = null // the worker's
    private lateinit var image: ImageView
    private lateinit var text: TextView

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        image = ImageView(this)
        text = TextView(this)
        val button = Button(this)
        button.text = "Pick a picture"
        button.setOnClickListener {
            val intent = Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE)
            startActivityForResult(intent.setType("image/*"), 0)
        }
        val layout = LinearLayout(this)
        layout.orientation = LinearLayout.VERTICAL
        layout.fitsSystemWindows = true
        layout.addView(button)
        layout.addView(text)
        layout.addView(image, LayoutParams(LayoutParams.MATCH_PARENT, LayoutParams.MATCH_PARENT))
        setContentView(layout)
    }

    @Deprecated("As long as there is no other dependency")
    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        val picture: Uri = data?.data ?: return
        text.text = "..."
        worker.execute {
            val message = try {
                show(picture)
            } catch (error: Throwable) { // OutOfMemoryError too
                error.toString()
            }
            runOnUiThread { text.text = message }
        }
    }

    private fun show(picture: Uri): String {
        // ImageDecoder turns a picture as its EXIF orientation says, and needs no memory for pixels that nobody sees.
        val bitmap = ImageDecoder.decodeBitmap(ImageDecoder.createSource(contentResolver, picture)) { decoder, info, _ ->
            decoder.allocator = ImageDecoder.ALLOCATOR_SOFTWARE
            decoder.setTargetSampleSize(maxOf(1, maxOf(info.size.width, info.size.height) / LONGEST_SIDE))
        }
        val open = network ?: Network(assets, "model.tflite", threads = 4).also { network = it }
        val found = open.segment(bitmap)
        runOnUiThread { image.setImageBitmap(found.overlay) }
        return "network %.1f ms, labels %.1f ms".format(found.networkMillis, found.labelMillis)
    }

    override fun onDestroy() {
        super.onDestroy()
        worker.shutdown()
    }
}
