// The choice of a picture: radio buttons with thumbnails, and a file that goes to the server at once.
// value: the name of a bundled picture, or "upload:" and the token that the server gave for a file.
const status = element.querySelector(".status");

function choose(name) {
  props.value = name;
  mark(); // watch() hears only of changes that come from the server
  trigger("input");
}

function mark() {
  const own = props.value.startsWith("upload");
  for (const radio of element.querySelectorAll("input[type=radio]")) {
    radio.checked = radio.value === props.value;
  }
  element.querySelector(".file").classList.toggle("chosen", own);
}

async function send(file) {
  if (file.size > props.most_bytes) {
    status.textContent = `error: the file has ${file.size} bytes, but may have ${props.most_bytes}; make it smaller`;
    return;
  }
  status.textContent = "uploading";
  try {
    const response = await fetch("picture", { method: "POST", body: file });
    const answer = await response.json();
    status.textContent = answer.error ? `error: ${answer.error}` : "";
    if (answer.token) choose(`upload:${answer.token}`);
  } catch (error) {
    status.textContent = "error: the file could not be uploaded; try again, or choose another one";
  }
}

element.addEventListener("change", (event) => {
  if (event.target.type === "radio") choose(event.target.value);
  if (event.target.type === "file" && event.target.files.length) {
    const file = event.target.files[0];
    send(file);
    event.target.value = ""; // so that the same file can be chosen again
  }
  event.stopPropagation();
});
watch("value", mark);
mark();
