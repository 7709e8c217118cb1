SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#reference",
  deepLinking: true,
  // The default would show every visitor's document to a validator on another host.
  validatorUrl: null,
});
