() => {
  // Ctrl+Enter (or Cmd+Enter) generates, Escape stops: each presses its button if that can be pressed now.
  const press = (id) => {
    const button = document.getElementById(id);
    if (button && !button.disabled && button.offsetParent !== null) button.click();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      press("generate");
    } else if (event.key === "Escape" && !event.isComposing && !event.defaultPrevented) {
      press("stop");
    }
  });
}
